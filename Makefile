# `make quickstart` runs the whole line, `make test` the whole suite; both set up what they need, once.
# EXIT=1 makes the quickstart stop by itself. PYTHON names another interpreter (3.11 or 3.12).
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test coverage test-portable lint format bench-training bench-gate bench-attacks bench-strength bench-standard bench-pools bench-evidence bench-drawn \
	setup-openvino bench-providers bench-checks bench-data bench-serving bench-detection bench-endurance bench-paging bench-bounds bench-alarms bench-watch kubernetes-rules \
	dashboards pictures report-schema sbom audit clean
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin

help:
	@echo 'make quickstart          train, evaluate, export, gate, promote, serve and watch a small model (Ctrl-C ends it)'
	@echo 'make quickstart EXIT=1   the same, and stop; exit code 0 only if every stage held'
	@echo 'make quickstart MODEL=shipped   verify, serve and watch the model in model_repository/; nothing is trained'
	@echo 'make check               lint, and the tests that take no server and no training: under a minute'
	@echo 'make test                the whole test suite'
	@echo 'make coverage            the same, and which lines of the package it never ran; ARGS="tests/gating" for a part'
	@echo 'make test-portable       the numeric tests as other processors and other draws would run them; ONLY="NAME ..."'
	@echo 'make lint                ruff, ruff format --check, mypy'
	@echo 'make bench-training      training speed beside the usual loop; writes benchmarks/results/training.json, .md'
	@echo 'make bench-gate          how often the sequential bounds err, and how many images they need; writes gate.json, .md'
	@echo 'make bench-attacks       PGD and Square beside foolbox, torchattacks and ART; writes attacks.json, .md'
	@echo 'make bench-strength      our AutoAttack beside torchattacks'"'"'; writes strength.json, .md'
	@echo 'make bench-evidence      the suite fast beside APGD-CE and APGD-T, image by image; writes evidence.json, .md'
	@echo 'make bench-drawn         whether a claim about the whole suite from a drawn part errs; writes drawn.json, .md'
	@echo 'make bench-standard      FAB-T and Square on what the table left of the shipped model'"'"'s images; DATA=cifar10.npz; writes standard.json, .md'
	@echo 'make bench-pools         what training in one threat, or a mixed pool, is worth under the others; DATA=cifar10.npz WORK=folder; writes pools_WIDTH.json, .md'
	@echo 'make bench-serving       Triton and the gateway beside bare ONNX Runtime; writes serving.json, .md'
	@echo 'make bench-detection     detectors of attacks by queries: cost, false alarms, recall; DATA=cifar10.npz; writes detection.json, .md'
	@echo 'make bench-endurance     1,000 rounds of the sidecar beside a real Triton; DATA=cifar10.npz; writes endurance.json, .md'
	@echo 'make bench-paging        how often the sidecar pages for nothing, and how soon for something; writes paging.json, .md'
	@echo 'make bench-bounds        whether the sidecar'"'"'s bounds are true while an accuracy changes; writes bounds.json, .md'
	@echo 'make bench-alarms        a drill: from weaker bytes to a page and back; writes alarms.json, .md'
	@echo 'make bench-watch         what the sidecar costs users; writes watch.json, watch_crafted.json, .md'
	@echo 'make bench-data          memory and time to the first step on JPEG files; DATA=photos; writes data.json, .md'
	@echo 'make bench-checks        which check catches which trap, and honest models; writes checks.json, .md'
	@echo 'make bench-providers     the shipped model as other providers and precisions serve it; DATA=cifar10.npz; writes providers.json, .md'
	@echo 'make sbom, make audit    what the serving images bring along (CycloneDX), and what is known against it'
	@echo 'make kubernetes-rules    the Prometheus rules as objects of the operator'
	@echo 'make dashboards          Grafana'"'"'s dashboards, from deploy/grafana/dashboards.py'
	@echo 'make pictures            every picture in docs/pictures, from its script; ONLY="flow threats report watch" for some'
	@echo 'make report-schema       the JSON schemas of a gate'"'"'s report and of its attestation, from their records'
	@echo 'make setup               only the two environments'
	@echo 'make setup-openvino      and one with OpenVINO as a second execution provider, 260 MB beside them'

setup: .venv/.installed .venv-triton/.installed

.venv/.installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'make: needs Python 3.11 or 3.12; name one with PYTHON=...'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --editable '.[train,serve,gateway,monitor,dev]'
	@touch $@

# Not compiled: of 20,000 files of Python a run imports a tenth, and compiles those once.
# Triton's pip runtime needs numpy < 2, so it lives apart, as it would in its own container.
.venv-triton/.installed: serving/triton/requirements.txt
	@test -n '$(PYTHON)' || { echo 'make: needs Python 3.11 or 3.12; name one with PYTHON=...'; exit 2; }
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --no-compile --requirement serving/triton/requirements.txt
	@touch $@

# The packages of the other two, behind another package of the module onnxruntime: .venv-openvino to gate with,
# .venv-openvino/triton to serve with. In seconds, as only that package is installed.
setup-openvino: .venv-openvino/.installed

.venv-openvino/.installed: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m venv --without-pip .venv-openvino
	$(BIN)/python -m venv --without-pip .venv-openvino/triton
	$(BIN)/pip --python .venv-openvino/bin/python install --no-deps 'onnxruntime-openvino==1.24.1'
	@packages() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		behind="import site; site.addsitedir('%s')\n"; \
		printf "$$behind" "$$(packages $(CURDIR)/.venv)" > "$$(packages .venv-openvino)/behind.pth"; \
		{ echo "$$(packages $(CURDIR)/.venv-openvino)"; printf "$$behind" "$$(packages $(CURDIR)/.venv-triton)"; } \
			> "$$(packages .venv-openvino/triton)/behind.pth"
	@touch $@

quickstart: setup
	@$(BIN)/python quickstart.py $(if $(MODEL),--model $(MODEL)) $(if $(EXIT),--exit)

# Three: while one waits for a server or a clock, the two cores have work. A file's tests stay in one process, for its
# fixtures, and files come in the order of tests/conftest.py.
test: setup setup-openvino
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 20

# Lines that run in the tests' own processes; what commands and servers run that tests start is not counted.
coverage: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov --cov-report term:skip-covered $(ARGS)

# The inner loop: what is quick by itself, see tests/conftest.py.
check: lint
	$(BIN)/python -m pytest --quick --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-portable: .venv/.installed
	$(BIN)/python -m tests.portable $(ONLY)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-training: .venv/.installed
	$(BIN)/python -m benchmarks.training

bench-gate: .venv/.installed
	$(BIN)/python -m benchmarks.gate

bench-attacks: .venv/.installed
	$(BIN)/python -m benchmarks.attacks $(if $(DATA),--shipped --data $(DATA))

bench-strength: .venv/.installed
	$(BIN)/python -m benchmarks.strength

bench-standard: .venv/.installed
	$(BIN)/python -m benchmarks.standard --data $(or $(DATA),cifar10.npz)

bench-pools: .venv/.installed
	$(BIN)/python -m benchmarks.pools --data $(or $(DATA),cifar10.npz) --work $(or $(WORK),pools)

bench-serving: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m benchmarks.serving

bench-detection: .venv/.installed
	$(BIN)/python -m benchmarks.detection --data $(or $(DATA),cifar10.npz)

bench-endurance: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m benchmarks.endurance --data $(or $(DATA),cifar10.npz)

bench-paging: .venv/.installed
	$(BIN)/python -m benchmarks.paging

bench-bounds: .venv/.installed
	$(BIN)/python -m benchmarks.bounds

bench-alarms: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m benchmarks.alarms

bench-watch: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m benchmarks.watch
	$(BIN)/python -m benchmarks.watch --crafted

bench-evidence: .venv/.installed
	$(BIN)/python -m benchmarks.evidence

bench-drawn: .venv/.installed
	$(BIN)/python -m benchmarks.drawn

bench-providers: .venv-openvino/.installed
	.venv-openvino/bin/python -m benchmarks.providers --data $(or $(DATA),cifar10.npz)

bench-data: .venv/.installed
	$(BIN)/python -m benchmarks.data --data $(or $(DATA),photos)

bench-checks: .venv/.installed
	$(BIN)/python -m benchmarks.checks

# The rules once more, as objects of the Prometheus operator.
kubernetes-rules:
	@for rules in serving robustness; do \
		sed -i '/^spec:/q' deploy/kubernetes/base/rules-$$rules.yaml; \
		grep -v '^#' deploy/prometheus/rules/$$rules.yaml | sed '/./s/^/  /' >> deploy/kubernetes/base/rules-$$rules.yaml; \
	done

# Grafana's dashboards as JSON, of deploy/grafana/dashboards.py.
dashboards: .venv/.installed
	$(BIN)/python deploy/grafana/dashboards.py

# What the pages show, in light and in dark; the sidecar's page comes from a real watch of the shipped model.
pictures: .venv/.installed .venv-triton/.installed
	$(BIN)/python -m docs.pictures.make $(ONLY)

report-schema: .venv/.installed
	$(BIN)/python -m dfmcl.gating.schema

# What faces the network (images `serve` and `gateway`) brings along, and what is known against it. The tools live apart.
.audit/.installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'make: needs Python 3.11 or 3.12; name one with PYTHON=...'; exit 2; }
	$(PYTHON) -m venv .audit/tools && $(PYTHON) -m venv .audit/release
	.audit/tools/bin/pip install --quiet cyclonedx-bom pip-audit
	.audit/release/bin/pip install --quiet '.[serve,gateway,cloud]'
	@touch $@

sbom: .audit/.installed
	.audit/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json .audit/release/bin/python

# --strict: a package that its database could not be asked about is a failure, not a clean bill.
audit: .audit/.installed
	@.audit/release/bin/pip list --format freeze --exclude dfmcl > .audit/requirements.txt
	@.audit/tools/bin/pip-audit --strict --disable-pip --no-deps --requirement .audit/requirements.txt || { \
		echo 'make audit: see above: vulnerable, or not audited as the database could not be reached'; exit 1; }

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-triton .venv-openvino .audit .quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
