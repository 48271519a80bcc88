# A fresh machine needs Python 3.10 or newer and make; `make demo` and `make test` do the rest, each by itself.
PYTHON ?= python3
PYTHONS ?= 3.10 3.12 3.13

.DEFAULT_GOAL := help
.PHONY: bench bench-figure crashes demo docs escapes fuzz growth help links lint readers test test-browser test-cuda test-frameworks test-lowest test-lowest-core test-middle test-pythons test-stores test-tools test-torches

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  */\1@/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "make %-16s %s\n", $$1, $$2 }'

demo: .venv/ready  ## train, convert, rebuild, resume: the main job, told step by step; OUT=DIR keeps what it makes
	.venv/bin/lora-state demo $(if $(OUT),--out '$(OUT)')

test: lint  ## lint, types and every test that needs no framework but torch, transformers and peft
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses auto --dist loadfile

lint: .venv/ready  ## ruff, mypy and pyright
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/pyright --pythonpath .venv/bin/python

test-frameworks: .venv-frameworks/ready  ## the converters against every framework they read
	OMP_NUM_THREADS=1 .venv-frameworks/bin/pytest -m frameworks

# An environment of its own kind: torch with CUDA, deepspeed and bitsandbytes, as the machine with the device has them.
test-cuda:  ## what needs a CUDA device: fused, capturable, bf16, pinned, NCCL, bitsandbytes, ZeRO; skipped without one
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON) -m pytest tests/cuda

docs: .venv/docs  ## the documentation as a site, warnings are errors
	.venv/bin/mkdocs build --strict

links:  ## ask every address on the web that a page links to; needs the network
	$(PYTHON) docs/links.py

fuzz: .venv/ready  ## ten minutes of random inputs for every reader
	.venv/bin/python tests/hostile/fuzz.py --seconds 600

escapes: .venv/ready  ## an hour of names that try to lead out of a folder, for every reader and writer
	.venv/bin/python tests/hostile/escapes.py --seconds 3600

bench: .venv/ready .venv-frameworks/ready  ## what it costs, beside cp, torch and DCP; an hour of a machine with 24 GB
	mkdir -p build; missed=0; \
	.venv/bin/python tests/bench/bench.py --megabytes 2048 1024 4096 --json build/bench.json || missed=1; \
	.venv/bin/python tests/bench/bench.py --megabytes 8192 --only convert || missed=1; \
	.venv-frameworks/bin/python tests/bench/sharded.py || missed=1; \
	exit $$missed

bench-figure: .venv/ready  ## the figure of the docs from build/bench.json; MACHINES="a.json b.json" for several machines
	.venv/bin/python tests/bench/measure.py $(or $(MACHINES),build/bench.json) --out docs/bench.svg

growth: .venv/ready  ## how the time of planning, naming, comparing grows with the number of parameters and groups
	OMP_NUM_THREADS=1 .venv/bin/python tests/bench/growth.py

crashes: .venv/ready  ## every writer, stopped at each system call (needs strace), and killed at random moments
	.venv/bin/python tests/io/kill_writer.py
	OMP_NUM_THREADS=1 .venv/bin/python tests/io/crash_writer.py random 200

WITH_OLDER := tests/naming tests/torch tests/integrations/test_transformers.py tests/operations/test_conversion.py \
	$(patsubst %,tests/converters/test_%.py,torch_optimizer versions rules)

# Not the vector of all dtypes, which safetensors knows only since a later version, nor a message with NumPy 2's repr.
LOWEST := tests/hostile/test_fuzz.py tests/format/test_manifest.py tests/spec/test_vectors.py \
	--deselect 'tests/spec/test_vectors.py::test_valid[dtypes]' \
	--deselect 'tests/format/test_manifest.py::test_a_state_that_breaks_a_rule_is_not_written[4]'

test-lowest: .venv-lowest/ready  ## the torch side, Trainer and names with the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest --numprocesses auto --dist loadfile $(WITH_OLDER) $(LOWEST)

test-lowest-core: .venv-lowest-core/ready  ## what needs no torch, with the lowest versions; without gigabytes to install
	.venv-lowest-core/bin/pytest $(LOWEST)

test-middle: .venv-middle/ready  ## the same with versions between those and the newest
	OMP_NUM_THREADS=1 .venv-middle/bin/pytest --numprocesses auto --dist loadfile $(WITH_OLDER)

TORCHES ?= 2.8.0 2.9.1 2.10.0

test-torches:  ## docs/torch.md, and dcp.save in this format, with other releases of torch; three gigabytes for each
	@for version in $(TORCHES); do \
		$(MAKE) --no-print-directory .venv-torch-$$version/ready && \
		OMP_NUM_THREADS=1 .venv-torch-$$version/bin/pytest tests/torch/test_sharded.py -k 'reads_it_without_us or dcp_writes' \
			|| exit 1; \
	done

WITHOUT_TORCH := tests/binding tests/format tests/hostile tests/io tests/mapping tests/model tests/spec \
	$(patsubst %,tests/operations/test_%.py,diff edit) tests/test_imports.py tests/test_registry.py \
	$(patsubst %,tests/converters/test_%.py,flax_msgpack mlx paddlenlp)

# A command of that name may be there and refuse to run: pyenv's, which run where they are asked for by version.
test-pythons:  ## what needs no torch, with every other version of Python that is here; a part of the largest and longest
	@for version in $(PYTHONS); do \
		export PYENV_VERSION=$$version; \
		if python$$version -c 'import ensurepip, venv' 2>/dev/null; then \
			$(MAKE) --no-print-directory .venv-$$version/ready && \
			.venv-$$version/bin/pytest --numprocesses auto --hypothesis-profile short \
				-k 'not memory and not 25 and not million and not thousands' $(WITHOUT_TORCH) \
				|| exit 1; \
		else \
			echo "skipped: no Python $$version here"; \
		fi; \
	done

# Call with a program and the Debian packages that have it: installs them where the program is missing and root asks.
define program
	@command -v $(1) >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2); } || \
		{ echo "there is no $(1) here: install $(2)"; exit 1; }
endef

readers:  ## the readers in JavaScript and Rust, and the matrix of all readers and vectors
	$(call program,node,nodejs)
	$(call program,cargo,cargo)
	@if command -v npm >/dev/null; then cd readers/js && npm install --silent --no-audit --no-fund --no-package-lock \
		&& npm run --silent types; else echo "without npm: no check of types, nor of the Hub's parser"; fi
	cd readers/js && node --test
	cargo test --quiet --offline --manifest-path readers/rust/Cargo.toml
	$(or $(and $(wildcard .venv/ready),.venv/bin/python),$(PYTHON)) spec/conformance/run.py

test-browser: .venv-browser/ready  ## the viewer in a headless Chromium
	$(call program,chromedriver,chromium chromium-driver)
	.venv-browser/bin/pytest -m browser tests/web

test-stores: .venv-stores/ready  ## states in S3, Google's store and the Hub, through their clients, against servers here
	.venv-stores/bin/pytest -m stores tests/io/test_object_stores.py

.venv-stores/ready: pyproject.toml constraints-stores.txt
	$(PYTHON) -m venv .venv-stores
	.venv-stores/bin/pip install --quiet --constraint constraints-stores.txt --editable '.[stores]'
	touch $@

# Without the tools' own bounds: bergson asks for torchvision, which it does not use, LESS for transformers of 2023.
SOURCES := https://github.com/princeton-nlp/LESS https://github.com/pmahdavi/ota-merge

test-tools: .venv-tools/ready  ## what others read moments with: bergson, LESS and OTA-Merge; two gigabytes and the network
	PYTHONPATH=.venv-tools/LESS:.venv-tools/ota-merge .venv-tools/bin/pytest -m tools tests/tools

.venv-tools/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet --constraint constraints.txt --editable '.[demo,tools]' hypothesis pytest
	.venv-tools/bin/pip install --quiet --no-deps bergson traker
	for source in $(SOURCES); do git clone --quiet --depth 1 $$source .venv-tools/$$(basename $$source) || exit 1; done
	touch $@

# A folder is ready until its constraints or the project's requirements change.
.venv/ready: pyproject.toml constraints.txt
	@echo 'Installing PyTorch, transformers, PEFT and the tests into .venv: some minutes, once.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/docs: .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv-frameworks/ready: pyproject.toml constraints-frameworks.txt
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/pip install --quiet --constraint constraints-frameworks.txt --editable '.[frameworks,test]'
	touch $@

.venv-browser/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/pip install --quiet --constraint constraints.txt --editable '.[browser]' hypothesis pytest
	touch $@

# expecttest: torch's own list of optimizer configurations asks for it.
.venv-lowest/ready .venv-middle/ready: .venv-%/ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --constraint constraints-$*.txt --editable '.[demo,zstd]' expecttest hypothesis \
		jsonschema pytest pytest-xdist safetensors
	touch $@

.venv-torch-%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/pip install --quiet --editable . torch==$* hypothesis pytest safetensors
	touch $@

.venv-lowest-core/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest-core
	.venv-lowest-core/bin/pip install --quiet --constraint constraints-lowest.txt --editable . hypothesis jsonschema pytest \
		safetensors
	touch $@

.venv-3.%/ready: pyproject.toml constraints.txt
	python3.$* -m venv .venv-3.$*
	.venv-3.$*/bin/pip install --quiet --constraint constraints.txt --editable . hypothesis jsonschema pytest pytest-xdist safetensors
	touch $@
