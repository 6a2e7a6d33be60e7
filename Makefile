# A file's tests share the graphs they compile, so a worker takes whole files.
# The two commands of the README are `make demo` and `make test`.

BIN := .venv/bin
ARGS ?=

.PHONY: demo test lint setup-demo setup-test

demo: setup-demo
	@$(BIN)/specc generate smollm2 --draft ngram --compare --prompt-file tools/demo_prompt.txt

test: setup-test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: setup-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup-demo setup-test: setup-%:
	@tools/setup.sh $*
