# make demo      set up, and make a picture with the embedded model
# make test      set up, run the linter, the type checker and the tests
# make embedded  train the embedded model from nothing (many hours; goes on where it stopped)
#
# Each creates .venv itself. PYTHON=python3.12 names the interpreter for it.

BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

# On Linux MLX multiplies with a slow reference BLAS unless OpenBLAS takes its place.
ifeq ($(shell uname -s),Linux)
OPENBLAS := $(firstword $(wildcard /usr/lib/$(shell uname -m)-linux-gnu/libopenblas.so.0))
ifneq ($(OPENBLAS),)
RUN := LD_PRELOAD=$(OPENBLAS)
else
SLOW := OpenBLAS not found: "apt-get install libopenblas0" makes this about 30 times faster
endif
endif

# Two tests compare trainings bit by bit. On an AMD EPYC they fail with OpenBLAS's AVX512 kernels and
# pass with its AVX2 kernels. The cause is not known (docs/training.md).
ifneq ($(shell grep -m 1 -o avx2 /proc/cpuinfo 2>/dev/null),)
KERNELS := OPENBLAS_CORETYPE=HASWELL
endif

.PHONY: demo test types embedded speed

demo: .venv/.installed speed
	@rm -f demo.png
	$(RUN) $(BIN)/snapgen-mlx generate "two blue cats" -o demo.png

test: .venv/.installed-test speed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(KERNELS) $(RUN) $(BIN)/python -m pytest -n 2 --dist loadfile

# The type checker reads files, and finds the packages where an installation has them.
types: .venv/.installed-test
	@mkdir -p build/linked
	@$(BIN)/python -m tests.linked_tree build/linked
	cd build/linked && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml

speed:
	@$(if $(SLOW),echo '$(SLOW)',:)

$(BIN)/pip:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then echo "creating .venv with $$($$python --version)"; exec $$python -m venv .venv; fi; \
	done; \
	echo "error: no Python 3.11 or newer with venv found; install python3 and python3-venv" >&2; \
	exit 1

.venv/.installed: pyproject.toml | $(BIN)/pip
	@echo "installing snapgen-mlx and MLX into .venv"
	@$(PIP) -e .
	@touch $@

# torch, the reference of the parity tests, comes first and in one version.
.venv/.installed-test: pyproject.toml | $(BIN)/pip
	@echo "installing snapgen-mlx, MLX and the test dependencies into .venv"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[test]'
	@touch $@ .venv/.installed

.venv/.installed-embedded: pyproject.toml | $(BIN)/pip
	@echo "installing snapgen-mlx, MLX and what builds the embedded model into .venv"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[embedded]'
	@touch $@ .venv/.installed

# The embedded model (docs/embedded.md). Needs npm, and the word list of Debian's wamerican-small.
# Every step is one target: what is there is not made again (remove it to make it again), and
# trainings go on from their last saved state.
S := runs/stickers
SHARDS = 69
PYTHON_M = $(RUN) $(BIN)/python -m
PRETRAIN = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 \
  $(BIN)/python -m recipes.pretrain.train

# Four steps: every width learns from the guided full width, from the captions of two shards, one
# of all kinds of scenes and one of mostly large things.
WIDTHS = tiny small full
TEACHER = $(S)/base
CAPTIONS = $(S)/data/shard-00000.json $(S)/data/shard-00006.json
DISTILL = --guidance 3 --lora 16 --learning-rate 5e-4 --batch 16 --steps 1000

embedded: $(S)/packed/config.json
	mkdir -p snapgen_mlx/assets/embedded
	cp -R $(S)/packed/. snapgen_mlx/assets/embedded

$(S)/packed/config.json: $(S)/model/config.json
	rm -rf $(S)/four-bits $(S)/packed
	$(RUN) $(BIN)/snapgen-mlx convert $(S)/torch $(S)/four-bits --quantize 4
	$(PYTHON_M) recipes.embedded.pack $(S)/model $(S)/four-bits $(S)/packed

# The float model with its few-step LoRAs. The base has none, since they would change the teacher.
$(S)/model/config.json: $(WIDTHS:%=$(S)/few/%/lora.safetensors)
	rm -rf $(S)/model
	mkdir -p $(S)/model/few_step
	for width in $(WIDTHS); do \
	  cp $(S)/few/$$width/lora.safetensors $(S)/model/few_step/$$width.safetensors || exit 1; done
	cp -R $(S)/base/. $(S)/model

.PRECIOUS: $(S)/few/%/lora.safetensors
$(S)/few/%/lora.safetensors: $(S)/base/config.json $(S)/prompts.txt | speed
	$(RUN) $(BIN)/snapgen-mlx distill $(S)/base $(S)/prompts.txt -o $(S)/few/$* --method kdmd --loss kd \
	  --variant $* --teacher $(TEACHER) $(DISTILL)

$(S)/prompts.txt: | $(S)/torch/model_index.json
	$(BIN)/python -c 'import json, sys; \
	  texts = [text for file in sys.argv[1:] for text in json.load(open(file))]; \
	  print(*dict.fromkeys(texts), sep="\n")' $(CAPTIONS) > $@.part
	mv $@.part $@

$(S)/base/config.json: $(S)/torch/model_index.json
	rm -rf $(S)/base
	$(RUN) $(BIN)/snapgen-mlx convert $(S)/torch $(S)/base

# Scenes are encoded beside the training, which waits for them.
$(S)/torch/model_index.json: | $(S)/data/heldout.safetensors $(S)/words/config.json
	$(PRETRAIN) --data $(S)/data --out $(S)/run --config recipes/pretrain/stickers.json \
	  --words $(S)/words --vae $(S)/vae & training=$$!; failed=0; \
	$(PYTHON_M) recipes.embedded.latents $(S)/sprites $(S)/vae $(S)/data --shards 0:$(SHARDS) || \
	  { failed=1; kill $$training; }; wait $$training || failed=1; exit $$failed
	mkdir -p $(S)/parts/vae
	cp $(S)/vae/config.json $(S)/vae/diffusion_pytorch_model.safetensors $(S)/parts/vae
	$(PYTHON_M) recipes.pretrain.export $(S)/run $(S)/torch --parts $(S)/parts

$(S)/data/heldout.safetensors: | $(S)/vae/ENCODER_FINAL
	$(PYTHON_M) recipes.embedded.latents $(S)/sprites $(S)/vae $(S)/data --heldout

$(S)/vae/ENCODER_FINAL: | $(S)/sprites/concepts.json
	$(BIN)/python -m recipes.embedded.autoencoder $(S)/sprites $(S)/vae --factor 8
	touch $@

$(S)/words/config.json: | .venv/.installed-embedded
	$(PYTHON_M) recipes.embedded.text_table $(S)/words --cache $(S)/cache

$(S)/sprites/concepts.json: | .venv/.installed-embedded
	$(PYTHON_M) recipes.embedded.sprites $(S)/sprites --cache $(S)/cache
