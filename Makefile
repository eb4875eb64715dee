# The commands of csi-loop's development; CI calls nothing else.
# Targets that need root compile as you and ask sudo for the rest.

GO       ?= go
DOCKER   ?= docker
IMAGE    ?= csi-loop
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# What the tests run over, and flags for every go test.
PKGS     ?= ./...
TESTARGS ?=
# What runs in the virtual machines; see test/vm, which has a test that no package with
# root tests is missing here.
VM_KERNELS ?= 6.1,6.12
VM_PKGS    ?= ./test/vm/guest ./internal/confine ./internal/roottest ./pkg/cgroup ./pkg/kubelet ./pkg/partition \
              ./pkg/router ./pkg/router/kube ./pkg/router/link ./pkg/loop ./pkg/mount ./pkg/crypt ./pkg/image ./pkg/driver \
              ./cmd/csi-loop ./cmd/csi-loop/survey ./test/sanity
VM_ARGS    ?=
# The limit for all packages on one kernel. Without KVM pkg/image alone takes most of an hour.
VM_TIMEOUT ?= 4h

COMMIT   ?= $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS  := -X main.version=$(VERSION) -X main.commit=$(COMMIT)
ROOT     := $(CURDIR)/hack/as-root
USER     := $(CURDIR)/hack/as-user
LINT     := bin/golangci-lint
# Root tests share the kernel's loop devices and the machine's disk: two packages at a time.
ROOTTEST := CSI_LOOP_ROOT_TESTS=1 $(GO) test -exec $(ROOT) -count=1 -p 2 -timeout 45m $(TESTARGS)

# Logs are read in CI too.
export GINKGO_NO_COLOR := TRUE

.DEFAULT_GOAL := help
# Every target that help lists.
.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## compile bin/csi-loop, stamped with the version
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/csi-loop ./cmd/csi-loop

plugin: ## compile bin/kubectl-csi_loop, the plugin of kubectl
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w' -o bin/kubectl-csi_loop ./cmd/kubectl-csi_loop

demo: ## show the whole life of a volume on this machine, in seconds (root)
	@hack/deps root
	@$(MAKE) --no-print-directory build
	@$(ROOT) bin/csi-loop demo

test: ## run every test: unit, chart, root, sanity, and a virtual machine where this one lacks a capability
	@hack/deps root
	@if hack/has-capability sys_resource; then vm=; else vm=test-growth; fi; \
	  MAKE='$(MAKE)' hack/steps test-unit chart-test test-root test-crash sanity $$vm

# The long ones of them are in test-root, which leaves nothing out. Four packages at a
# time: they mostly wait, for disks and for clocks.
test-unit: ## run the tests that need no root, with the race detector
	@hack/deps unit
	$(GO) test -exec $(USER) -race -short -p 4 -timeout 10m $(TESTARGS) $(PKGS)

# test/crash looks at the driver from outside: the race detector sees nothing of that.
test-root: ## run all tests but sanity and test-crash as root, with the race detector, on this machine's kernel
	@hack/deps root
	$(ROOTTEST) -race -skip Sanity $$($(GO) list $(PKGS) | grep -v /test/crash$$)

sanity: ## run the CSI conformance tests against the driver on real loop devices (root)
	@hack/deps root
	$(ROOTTEST) -run Sanity -v ./test/sanity

test-crash: ## kill the driver at every system call that changes something, and fail each (root; CSI_LOOP_LONG=1: all)
	@hack/deps root
	CSI_LOOP_ROOT_TESTS=1 $(GO) test -exec $(ROOT) -count=1 -timeout 10h -v $(TESTARGS) ./test/crash/...

# How many lives a soak has, and after which time no more of them begin. Its mounts are
# its own: a mount namespace that somebody makes meanwhile would keep copies of them.
CYCLES ?= 10000
FOR    ?=

soak: ## take volumes through CYCLES (10000) lives, 32 at a time, and kill the driver every few seconds; FOR=20m ends it early (root)
	@hack/deps root
	CSI_LOOP_SOAK=$(CYCLES) CSI_LOOP_FOR=$(FOR) CSI_LOOP_ROOT_TESTS=1 \
	  $(GO) test -exec '$(ROOT) unshare --mount --propagation private' -count=1 -timeout 24h -v -run 'TestSoak$$' $(TESTARGS) ./test/integration

test-vm: ## run the root tests on other kernels in virtual machines, needs no root
	@hack/deps vm
	$(GO) run ./test/vm -kernels $(VM_KERNELS) -timeout $(VM_TIMEOUT) $(VM_ARGS) $(VM_PKGS)

test-kernels: ## test-vm and test-vm-driver: hours without KVM
	@MAKE='$(MAKE)' hack/steps test-vm test-vm-driver

test-vm-driver: VM_PKGS = ./test/integration ./test/crash ./test/crash/gate
test-vm-driver: ## run the tests of the driver as a process on other kernels, shortened, needs no root
	@hack/deps vm
	$(GO) run ./test/vm -kernels $(VM_KERNELS) -timeout $(VM_TIMEOUT) $(VM_ARGS) $(VM_PKGS) -- -test.short

test-powercut: ## cut the power of virtual machines N times for each pool's filesystem, under a churn of volumes; needs no root
	@hack/deps vm
	$(GO) run ./test/vm -kernels $(VM_KERNELS) -cuts $(N) -timeout 30m $(VM_ARGS)
test-powercut: VM_KERNELS = 6.12
N ?= 10

test-powercut-short: VM_ARGS = -pools xfs
test-powercut-short: test-powercut ## the same for one of the filesystems: what CI runs

test-disk: VM_PKGS = ./test/integration
test-disk: VM_TIMEOUT = 1h
test-disk: ## let the pool's disk fail under volumes in use, in virtual machines with a device mapper, needs no root
	@hack/deps vm
	$(GO) run ./test/vm -kernels $(VM_KERNELS) -timeout $(VM_TIMEOUT) $(VM_ARGS) $(VM_PKGS) -- -test.v -test.run 'TestFailingDisk/$(DISKS)'
DISKS ?=

test-disk-short: VM_KERNELS = 6.12
test-disk-short: DISKS = (ext4|xfs)
test-disk-short: test-disk ## the same on one kernel, for two of the filesystems: what CI runs

test-growth: VM_KERNELS = 6.1
test-growth: VM_PKGS = ./test/vm/guest ./pkg/mount ./test/sanity
test-growth: VM_TIMEOUT = 25m
test-growth: test-vm ## run what needs CAP_SYS_RESOURCE (growing a mounted ext4) in a virtual machine, needs no root

test-encryption: VM_KERNELS = 6.1
test-encryption: VM_PKGS = $(ENCRYPTION_PKGS)
test-encryption: VM_TIMEOUT = 2h
test-encryption: ## run the tests of encrypted volumes in a virtual machine, needs no root
	@hack/deps vm
	$(GO) run ./test/vm -kernels $(VM_KERNELS) -timeout $(VM_TIMEOUT) $(VM_ARGS) $(VM_PKGS) -- -test.v \
	  -test.run '$(ENCRYPTION)'
ENCRYPTION ?= Encrypt|Mapping|LastUser|Argon2|Header|ProgramEnds|Passphrase|ContentOf
ENCRYPTION_PKGS ?= ./pkg/crypt ./pkg/driver ./test/crash

test-encryption-short: ENCRYPTION = LifeOfAMapping|ReadHeader|EncryptedFilesystem/ext4_thin|EncryptedBlock|EncryptedDamage|EncryptedKill/ext4
test-encryption-short: ENCRYPTION_PKGS = ./pkg/crypt ./pkg/driver
test-encryption-short: test-encryption ## some of them: what CI runs

bench: ## measure each CSI call beside floors of bare kernel calls (root)
	@hack/deps root
	@$(MAKE) --no-print-directory build
	$(GO) build -buildvcs=false -o bin/bench ./test/bench
	$(ROOT) bin/bench -commit=$(VERSION) $(BENCH_ARGS)

bench-scale: BENCH_ARGS = -part scale -n 40 -svg docs/performance-scale.svg -mutexprofile bin/mutex.pprof
bench-scale: bench ## the same among 1000 and 5000 volumes, by 64 clients, and the start; draws docs/performance-scale.svg (root)

bench-guard: BENCH_ARGS = -part guard -n 12 -volumes 200
bench-guard: bench ## fail if the driver got slow beside the floors of the same run, with wide bounds (root)

bench-link: ## measure the links of 1000 simulated nodes to one controller (NODES=n for another number)
	$(GO) test ./pkg/router -run '^$$' -bench Nodes -benchtime 20000x -timeout 20m $(TESTARGS)

bench-smoke: BENCH_ARGS = -n 3 -volumes 20
bench-smoke: bench ## the same with a few rounds only: does it still run

# Tables and plots go to docs/bench; BENCH_OUT= keeps them nowhere.
BENCH_OUT ?= docs/bench

bench-snapshot: ## measure snapshots, restores, clones and deltas beside bare calls and a full copy (root)
	@hack/deps root
	@$(MAKE) --no-print-directory build
	$(GO) build -buildvcs=false -o bin/bench-snapshot ./test/bench/snapshot
	$(ROOT) bin/bench-snapshot $(if $(BENCH_OUT),-out $(BENCH_OUT)/snapshot.md) $(BENCH_ARGS)

bench-io: ## measure I/O of volumes beside a file, losetup and a buffered loop device, with fio and PostgreSQL (root)
	@hack/deps bench
	@$(MAKE) --no-print-directory build
	$(GO) build -buildvcs=false -o bin/bench-io ./test/bench/io
	$(ROOT) bin/bench-io $(if $(BENCH_OUT),-out $(BENCH_OUT)) $(BENCH_ARGS)

bench-io-smoke: BENCH_OUT =
bench-io-smoke: BENCH_ARGS = -pieces ext4-block -rounds 1 -size 64 -jobs '4k-1$$|-1M'
bench-io-smoke: bench-io ## one short piece of it: does it still run

# How long each fuzz target runs.
TIME ?= 30s

fuzz: ## run every fuzz target for TIME (30s) each; PKGS=./pkg/image for those of one package
	nice hack/fuzz $(TIME) $(PKGS)

check: ## everything CI checks without running a test: format, vet, lint, modules, generated files
	@MAKE='$(MAKE)' hack/steps check-fmt check-vet lint check-mod check-generate check-chart

.PHONY: check-fmt check-vet check-mod check-generate check-chart
check-fmt: $(LINT)
	$(LINT) fmt --diff

check-vet:
	$(GO) vet ./...
	GOOS=darwin $(GO) vet ./...

check-mod:
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff
	cd tools/audit && $(GO) mod tidy -diff

check-generate:
	hack/check-unchanged $(GO) generate ./...

lint: $(LINT) ## run golangci-lint
	$(LINT) run ./...

fmt: $(LINT) ## format the Go code
	$(LINT) fmt
	cd test/chart && ../../$(LINT) fmt -c ../../.golangci.yml

generate: deploy-manifests ## write all generated files
	$(GO) generate ./...

# The linter is built from source at the version in tools/go.mod: minutes once, then cached.
$(LINT): tools/go.mod tools/go.sum
	cd tools && $(GO) build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@

# Both are built from source at the versions in tools/audit/go.mod.
AUDIT := bin/govulncheck bin/cyclonedx-gomod
bin/govulncheck: TOOL := golang.org/x/vuln/cmd/govulncheck
bin/cyclonedx-gomod: TOOL := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
$(AUDIT): tools/audit/go.mod tools/audit/go.sum
	cd tools/audit && $(GO) build -o ../../$@ $(TOOL)
	@touch $@

vuln: bin/govulncheck ## look for known vulnerabilities in what is called; asks vuln.go.dev
	bin/govulncheck ./...

sbom: bin/cyclonedx-gomod build ## list what bin/csi-loop consists of, with versions and hashes: bin/csi-loop.cdx.json
	bin/cyclonedx-gomod bin -json -std -version '$(VERSION)' -output bin/csi-loop.cdx.json bin/csi-loop

image: ## build the container image with docker, or DOCKER=podman
	$(DOCKER) build --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) -t $(IMAGE):$(VERSION) .

# The chart's tests are a module of their own, for what they need of Helm.
CHART := cd test/chart && $(GO)

chart-test: ## render the chart with many values, and check what comes out; needs no cluster
	$(CHART) test -count=1 $(TESTARGS) ./...

deploy-manifests: ## write deploy/ and the tables of values in the chart's README and docs/reference
	$(CHART) run ./generate

check-chart: $(LINT)
	$(CHART) mod tidy -diff
	cd test/chart && ../../$(LINT) run -c ../../.golangci.yml ./... && ../../$(LINT) fmt -c ../../.golangci.yml --diff ./...
	hack/check-unchanged $(MAKE) --no-print-directory deploy-manifests

# A Kubernetes of our own on this machine; see test/e2e/README.md. Everything is
# built from Go modules, into the user's cache: 20 minutes once, then seconds.
E2E          := cd test/e2e && $(GO)
CLUSTER_ARGS ?=

cluster: ## start Kubernetes with 3 nodes on this machine, without a container engine (root)
	@hack/deps cluster
	@$(E2E) build -trimpath -buildvcs=false -o ../../bin/cluster ./cluster
	@bin=$$($(E2E) run ./build cluster sidecars helm) && ($(E2E) run ./images $$bin) && \
	  $(ROOT) $(CURDIR)/bin/cluster -bin=$$bin $(CLUSTER_ARGS) up

cluster-down: ## end it, and leave nothing on the machine (root)
	@$(E2E) build -trimpath -buildvcs=false -o ../../bin/cluster ./cluster
	@$(ROOT) $(CURDIR)/bin/cluster down

e2e-build: ## build all that the cluster and its tests consist of, and print where it is
	@hack/deps cluster
	@bin=$$($(E2E) run ./build) && ($(E2E) run ./images $$bin) && echo $$bin

# Another architecture than this machine's, with qemu: make test-image IMAGE_ARCH=arm64
export IMAGE_ARCH
EMULATE := $(if $(IMAGE_ARCH),$(CURDIR)/test/e2e/image/emulate $(IMAGE_ARCH))

image-archive: ## build the image without a container engine, to bin/image.tar (root)
	@hack/deps image
	$(ROOT) $(EMULATE) $(CURDIR)/test/e2e/image/build $(IMAGE):$(VERSION) $(CURDIR)/bin/image.tar \
	  --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT)

test-image: image-archive ## prove that the image has every program that the driver can call (root)
	cd test/e2e && CSI_LOOP_IMAGE=$(CURDIR)/bin/image.tar $(GO) test -exec '$(ROOT) $(EMULATE)' -count=1 -v ./image

# The same flags as the build, or client-go is compiled a second time. Linting the
# rest of test/e2e would compile all of Kubernetes; the build does that.
E2E_PKGS := . ./build ./cluster ./image ./images ./pause ./report
check-e2e: $(LINT) ## format, vet and lint the test cluster's own code
	$(E2E) mod tidy -diff
	cd test/e2e && CGO_ENABLED=0 $(GO) vet -trimpath $(E2E_PKGS)
	cd test/e2e && CGO_ENABLED=0 GOFLAGS="$(GOFLAGS) -trimpath" ../../$(LINT) run -c ../../.golangci.yml $(E2E_PKGS)
	cd test/e2e/kind && $(GO) mod tidy -diff && ../../../$(LINT) run -c ../../../.golangci.yml ./... && $(GO) test ./...

# Where the tests go, and a command that cuts a node's power. The defaults are those
# of "make cluster"; with kind set both, see test/e2e/README.md.
OWN_KUBECONFIG := $(or $(CSI_LOOP_E2E_STATE),/var/tmp/csi-loop-e2e)/pki/admin.kubeconfig
E2E_RESULTS    ?= $(CURDIR)/bin/e2e-results
e2e-install test-e2e test-docs e2e-suite e2e-rights: export KUBECONFIG ?= $(OWN_KUBECONFIG)
test-e2e: export CSI_LOOP_E2E_POWER ?= $(ROOT) $(CURDIR)/bin/cluster
.PHONY: e2e e2e-load e2e-install test-e2e e2e-suite e2e-rights kind kind-down

e2e-load: image-archive ## put the image onto every node of the cluster (root)
	$(ROOT) $(CURDIR)/bin/cluster load $(CURDIR)/bin/image.tar

e2e-install: ## install the chart with the tests' values, or upgrade to it
	@bin=$$($(E2E) run ./build helm) && sum=$$(cat bin/image.tar 2>/dev/null | sha256sum | cut -c 1-16) && \
	  $$bin/helm upgrade --install csi-loop charts/csi-loop --namespace=csi-loop --create-namespace --values=test/e2e/values.yaml \
	    --set-string=image.tag=$(VERSION),node.podAnnotations.image=$$sum,controller.podAnnotations.image=$$sum \
	    --hide-notes --wait --timeout=5m $(E2E_INSTALL_ARGS)

test-e2e: ## run our tests against the cluster of KUBECONFIG, where csi-loop is installed
	@bin=$$($(E2E) run ./build helm) && mkdir -p bin && { [ ! -e $$bin/hyperkube ] || ln -sf $$bin/hyperkube bin/kubectl; } && cd test/e2e && \
	  CGO_ENABLED=0 PATH=$(CURDIR)/bin:$$PATH CSI_LOOP_E2E_HELM=$$bin/helm $(GO) test -trimpath -count=1 -timeout=60m -v $(TESTARGS) ./

test-docs: ## run every command of docs/ and the READMEs, on this machine and against that cluster, and list those that no test runs (root)
	@hack/deps root
	@$(GO) test -count=1 -v ./test/docs
	@$(ROOTTEST) -run "$$($(GO) run ./test/docs/blocks others test/e2e)" $$($(GO) run ./test/docs/blocks packages test/e2e)
	@$(MAKE) --no-print-directory test-e2e TESTARGS="-run='Tutorials|$$($(GO) run ./test/docs/blocks tests test/e2e)'"

e2e-suite: ## run Kubernetes' own storage suite against it, on SUITE_FILESYSTEMS (xfs ext4 groups)
	@bin=$$($(E2E) run ./build suite) && test/e2e/suite/run $$bin $(E2E_RESULTS) $(SUITE_FILESYSTEMS)

e2e-rights: ## compare what csi-loop asked the API for, in the tests so far, with what it may
	@$(MAKE) --no-print-directory test-e2e TESTARGS=-run=TestRights CSI_LOOP_E2E_AUDIT=1

# How many claims bench-e2e makes.
CLAIMS ?= 200

bench-e2e: export CSI_LOOP_E2E_BENCH = $(CLAIMS)
bench-e2e: export KUBECONFIG ?= $(OWN_KUBECONFIG)
bench-e2e: ## measure CLAIMS (200) claims with pods at once, in the cluster of KUBECONFIG where the image is loaded
	@$(MAKE) --no-print-directory e2e-install E2E_INSTALL_ARGS='--set=loopDevices.max=120 --set=log.level=1'
	@$(MAKE) --no-print-directory test-e2e TESTARGS='-run=TestBenchClaims -timeout=60m'

# Everything of the above, from nothing to nothing, and never on another cluster.
e2e: export KUBECONFIG := $(OWN_KUBECONFIG)
e2e: ## start a cluster, install csi-loop, run our tests and the official suite, end the cluster (root)
	@trap '$(MAKE) --no-print-directory cluster-down' EXIT && \
	  $(MAKE) --no-print-directory cluster CLUSTER_ARGS=-pool=xfs && \
	  $(MAKE) --no-print-directory e2e-load e2e-install && \
	  { MAKE='$(MAKE)' hack/steps test-e2e e2e-suite e2e-rights || { hack/e2e-logs; exit 1; }; }

kind: image ## start a cluster with kind, on a machine with Docker, and load the image (root)
	@hack/deps kind
	cd test/e2e/kind && $(GO) build -trimpath -o ../../../bin/kind sigs.k8s.io/kind
	KIND=bin/kind test/e2e/kind/up $(IMAGE):$(VERSION)

kind-down: ## end it (root)
	KIND=bin/kind test/e2e/kind/down

clean: ## remove what was built
	rm -rf bin
