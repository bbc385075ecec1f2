# The commands of the README. Each makes the environment first when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads that wait for each other without spinning: a little slower on quiet cores, several times faster on busy ones.
export OMP_WAIT_POLICY ?= PASSIVE

# Releases of transformers that are tested, each in an environment of its own; src/keural/releases.py has the same.
RELEASES := 5.17.0 5.19.0 5.23.0 5.24.0
RELEASE := .venv-transformers-

# What a change of a library shows up in: network, card's code, engines, conversion, tokenizers, recipes, cleaning, TRL and PEFT.
EDGE_TESTS := tests/model tests/serve tests/convert tests/evaluate tests/tokenizer tests/recipe tests/data/test_cleaning.py \
	tests/data/test_hub.py tests/train/test_trl.py

.PHONY: test-common test-fuzz test-page test-processors setup setup-llama demo test test-llama test-slow test-transformers $(RELEASES:%=test-transformers-%) releases test-newest test-oldest test-wheel docs lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(READY)

# llama-cpp-python comes as source and compiles for about ten minutes; pip keeps what it built and takes it the next time.
setup-llama: $(VENV)/.ready-llama

$(VENV)/.ready-llama: $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e '.[llama]'
	touch $@

# A step of the toy is a thousand small operations. Threads that sleep between them take longer to wake than to work, and threads that
# spin need cores that nobody else wants; one thread needs neither (OMP_NUM_THREADS=2 is faster on quiet cores without OMP_WAIT_POLICY).
demo: export OMP_NUM_THREADS ?= 1
demo: $(READY)
	$(BIN)/keural run toy

# A file's tests run in one process, so that what they share is made once.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# The chat page in a browser: needs Debian's `chromium` (apt-get install chromium) and two packages that nothing else does.
test-page: $(READY)
	$(BIN)/python -m pip install playwright axe-playwright-python
	$(BIN)/python -m pytest tests/serve/web

# Every operation of the server with what its description allows and what it does not; some five minutes.
test-fuzz: $(READY)
	$(BIN)/python -m pytest tests/serve/server/test_fuzz.py --timeout 600

# What the quick suite leaves out, and every property with other examples, and more of them.
test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or hypothesis" --timeout 3600 --hypothesis-profile=random

# What needs llama.cpp, of which the quick suite skips most where it is not installed.
test-llama: $(VENV)/.ready-llama
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $$(grep -rl llama_cpp tests --include='test_*.py')

# The published card's code in an environment without this package, then the tests of the network with that environment's release put
# before the one that is installed; for each release. The environments stay for the next time.
test-transformers: $(RELEASES:%=test-transformers-%)

$(RELEASES:%=test-transformers-%): test-transformers-%: $(READY) $(RELEASE)%/.ready
	KEURAL_CLEAN_PYTHONS=$(CURDIR)/$(RELEASE)$*/bin/python $(BIN)/python -m pytest -k "not suite" tests/convert/test_card_usage.py
	PYTHONPATH=$$(echo $(CURDIR)/$(RELEASE)$*/lib/python*/site-packages) $(BIN)/python -m pytest -n 2 --dist loadfile tests/model

# One a line, for those who go through them one after the other.
releases:
	@printf '%s\n' $(RELEASES)

# transformers' own tests of every model, from the source of each release, run on this package's network; some two minutes.
test-common: $(READY) $(RELEASES:%=$(RELEASE)%/.source)
	$(BIN)/python -m pip install parameterized
	for release in $(RELEASES); do \
		KEURAL_TRANSFORMERS_SOURCE=$(CURDIR)/$(RELEASE)$$release/source/transformers-$$release HF_HUB_OFFLINE=1 \
			PYTHONPATH=$$(echo $(CURDIR)/$(RELEASE)$$release/lib/python*/site-packages) $(BIN)/python -m pytest \
			-o addopts="-ra --import-mode=importlib -p no:cacheprovider" tests/model/test_transformers_own.py || exit 1; \
	done

$(RELEASE)%/.source: $(RELEASE)%/.ready
	$(BIN)/python -m pip download --no-deps --no-binary :all: --no-build-isolation -d $(@D)/source transformers==$*
	tar xzf $(@D)/source/transformers-$*.tar.gz -C $(@D)/source
	touch $@

# The newest of every library that the package admits, whatever constraints.txt says, and the oldest; made anew each time, since the
# newest change. torch is the newest or oldest of which there is a CPU build. A failure names the releases it came with.
test-newest test-oldest: test-%:
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python .ci/bounds.py $* > .venv-$*/bounds.txt
	.venv-$*/bin/python -m pip install --no-compile -c .venv-$*/bounds.txt torch
	.venv-$*/bin/python -m pip install --no-compile -c .venv-$*/bounds.txt -e '.[dev]'
	.venv-$*/bin/python -m pip check
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(EDGE_TESTS) || \
		{ echo "make test-$* failed with: $$(.venv-$*/bin/python -m keural.releases)"; exit 1; }
	@echo "make test-$* passed with: $$(.venv-$*/bin/python -m keural.releases)"

$(RELEASE)%/.ready: $(READY) constraints.txt
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --no-compile -c constraints.txt torch
	$(@D)/bin/python -m pip install --no-compile transformers==$* accelerate
	touch $@

# What somebody gets who installs the package: its wheel, in a fresh environment outside this directory.
test-wheel:
	PYTHON="$(PYTHON)" .ci/wheel

# The pages that are made from the code; a test says when they are out of date.
docs: $(READY)
	$(BIN)/python -m keural.recipe.reference > docs/recipes.md.new
	mv docs/recipes.md.new docs/recipes.md
	$(BIN)/python -m keural.data.preview.reference > docs/adapters.md.new
	mv docs/adapters.md.new docs/adapters.md

# What computes, as on processors without AVX-512 and without AVX2: sums are rounded elsewhere there, and no result may hang on it.
# What this machine has itself is tested by `make test`.
NUMERIC := tests/model tests/serve/batching $(wildcard tests/serve/test_*.py) tests/train tests/lora tests/plan \
	$(wildcard tests/evaluate/test_*.py) tests/evaluate/generated tests/convert
OLDER := import torch; known = ["DEFAULT", "AVX2", "AVX512"]; own = torch.backends.cpu.get_cpu_capability(); \
	print(*known[:known.index(own) if own in known else 0])
test-processors: $(READY)
	for capability in $$($(BIN)/python -c '$(OLDER)' | tr A-Z a-z); do \
		ATEN_CPU_CAPABILITY=$$capability $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(NUMERIC) || exit 1; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(RELEASE)* .venv-newest .venv-oldest build dist src/*.egg-info .mypy_cache .ruff_cache
