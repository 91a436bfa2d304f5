.PHONY: install bench test ranks targets docs package lint format

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
KERNELS := tests/apo_kernels/triton
RANKS := tests/integrations tests/apo/test_distributed.py tests/apo/test_sharded.py
# in the interpreter these take minutes
LONG := $(addprefix $(KERNELS)/,test_forward.py test_derivatives.py test_model.py)

install: $(VENV)/.installed

# One environment for both commands; made anew when what it holds has changed.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

bench: install  ## the microbenchmarks at their quick setting: tables, plots and JSON in results/
	$(BIN)/python -m benchmarks --quick

test: install lint  ## lint, types and tests; the kernels in Triton's interpreter beside the others
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interpret $(LONG:%=--ignore=%) $(KERNELS) \
		> $(VENV)/interpret.log 2>&1 & kernels=$$!; \
	$(BIN)/python -m pytest -q -n auto --dist loadscope -m "not interpret and not aot" \
		$(RANKS:%=--ignore=%); others=$$?; \
	wait $$kernels; interpreted=$$?; cat $(VENV)/interpret.log; exit $$((others + interpreted))

ranks: install  ## both front ends on several ranks: DDP, FSDP2, tensor parallel, torchrun, and in trainers
	$(BIN)/python -m pytest -q -n auto --dist loadscope $(RANKS)

targets: install  ## the long tests in the interpreter, and every kernel compiled for every GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto -m interpret $(LONG)
	$(BIN)/python -m pytest -q -m aot $(KERNELS) tests/benchmarks/kernels/test_targets.py

docs: install  ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

package: install  ## wheel and sdist in dist/, checked, and the wheel used in clean environments: MATRIX says which
	$(BIN)/python .ci/package.py $(MATRIX)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
