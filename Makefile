# `make demo`, `make test` and `make gpu` run in .venv, made here with the versions in constraints.txt, or in an
# environment of your own (a GPU container, say), in which nothing but fastclip itself is installed, or not even that:
# `make demo PY=/path/to/python`.

PYTHON ?= python3

ifdef PY
READY := own-environment
else
PY := .venv/bin/python
READY := .venv/installed
endif

.PHONY: help demo test gpu sanitize own-environment

help:
	@echo 'make demo    train a small GPT with torch and with fastclip, and compare (ARGS="--steps 20" for fewer steps)'
	@echo 'make test    run the tests (ARGS="-k norm" for some of them)'
	@echo 'make gpu     all that a GPU is asked: tests, times, profiles (PARTS="check tests" for some of it, ARGS=--dry without one)'
	@echo 'make sanitize  drive the CPU kernels by random tables, under sanitizers (gcc or clang; no Python)'
	@echo
	@echo 'The first three use .venv, made with PYTHON=$(PYTHON). PY=/path/to/python uses an environment of your own instead.'

# In a checkout that is linked rather than installed (see below), whatever runs finds it.
RUN = PYTHONPATH="$$(test -e fastclip/kernels && echo "$(CURDIR):")$$PYTHONPATH" "$(PY)"

demo: $(READY)
	$(RUN) examples/demo.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest $(ARGS)

gpu: $(READY)
	$(RUN) -m benchmarks.on_gpu $(ARGS) $(PARTS)

# What setup.py has the kernels compiled with, and what the sanitizers take a few seconds for.
KERNEL_FLAGS := -std=gnu11 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror
sanitize: tests/backends/drive.c $(wildcard kernels/*.c kernels/*.h)
	@mkdir -p out
	$(CC) $(KERNEL_FLAGS) -O3 kernels/cpu.c kernels/adapt.c $< -o out/drive -lm -lpthread && out/drive 60
	$(CC) $(KERNEL_FLAGS) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all kernels/cpu.c kernels/adapt.c $< \
	  -o out/drive-memory -lm -lpthread && out/drive-memory 40
	$(CC) $(KERNEL_FLAGS) -O1 -g -fsanitize=thread kernels/cpu.c kernels/adapt.c $< -o out/drive-threads -lm -lpthread && out/drive-threads 20

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard kernels/*.c kernels/*.h)
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastclip needs Python 3.10 or newer: name one with PYTHON=")'
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --editable ".[test,examples]" --constraint constraints.txt
	@touch $@

# In an environment of your own, what is missing is named and left to you. sys.path[0], the current folder, is no sign
# of an installation and does not count.
NEEDED := torch numpy matplotlib $(if $(filter test,$(MAKECMDGOALS)),pytest pytest-benchmark pytest-cov hypothesis) \
  $(if $(filter gpu,$(MAKECMDGOALS)),pytest hypothesis)
define IS_COMPLETE
import sys; from importlib.util import find_spec; del sys.path[0]; \
missing = [name for name in sys.argv[1:] if not find_spec(name.replace("-", "_"))]; \
missing and sys.exit("Missing there; install with: \"%s\" -m pip install %s" % (sys.executable, " ".join(missing)))
endef
define HAS_FASTCLIP
import os, sys; from importlib.util import find_spec; del sys.path[0]; spec = find_spec("fastclip"); \
sys.exit(not (spec and os.path.samefile(os.path.dirname(spec.origin), "fastclip")))
endef
# Says whether the kernels for the CPU are there, whichever way fastclip is found.
define HAS_NATIVE
import sys; from importlib.util import find_spec; sys.exit(not find_spec("fastclip.kernels.native"))
endef

# Where pip cannot install it without a network (it takes setuptools 77), a link has `fastclip.kernels` found in this
# checkout, and the kernels for the CPU are compiled beside it.
INCLUDE = $$("$(PY)" -c 'import sysconfig; print(sysconfig.get_path("include"))')
own-environment:
	@"$(PY)" -c '$(IS_COMPLETE)' $(NEEDED)
	@"$(PY)" -c '$(HAS_FASTCLIP)' \
	  || "$(PY)" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . 2>/dev/null \
	  || { echo 'Linked (fastclip/kernels), rather than installed: pip cannot do that there' && ln -sfn ../kernels fastclip/kernels; }
	@"$(PY)" -c '$(HAS_NATIVE)' \
	  || $(CC) $(subst -Werror,,$(KERNEL_FLAGS)) -O3 -shared -fPIC -DPy_LIMITED_API=0x030A0000 -I"$(INCLUDE)" \
	    kernels/module.c kernels/cpu.c kernels/adapt.c -o kernels/native.abi3.so \
	  || echo 'The kernels for the CPU cannot be compiled here: NumPy serves it' >&2
