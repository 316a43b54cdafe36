# The two that a newcomer needs:
#   make demo   see it work, in network namespaces of its own
#   make test   run every test there is
# Both install what is missing (as root, by apt-get or dnf).

VERSION  ?= $(shell sed -n 's/^var version = "\(.*\)"/\1/p' main.go)
FUZZTIME ?= 400000x
GO       ?= go
# The product's packages, whose tests take seconds.
UNITS    := . ./arp ./conf ./dhcp ./engine ./host ./lease ./server ./store ./test/demo/dhcpd

.PHONY: build demo test race lint fuzz bench soak clean

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o oam-docker-ipam .

demo: build
	@./test/install demo
	@$(GO) run ./test/demo

test:
	@./test/install test
	$(GO) test -timeout 20m ./...

race:
	@./test/install race test
	$(GO) test -race -timeout 10m $(UNITS)

lint:
	@test -z "$$($(GO) tool gofumpt -l . | tee /dev/stderr)" || { echo 'run: go tool gofumpt -w .'; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# Every fuzz target for FUZZTIME: a count of inputs. Not a duration: at its end
# Go before 1.27 may fail a target that found nothing (go.dev/issue/75804).
fuzz:
	@for package in $(UNITS); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "fuzz $$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1000x $$package || exit 1; \
		done; \
	done

bench: build
	@./test/install test
	$(GO) run ./test/bench

# What takes too long for each change: more of everything, then the end to end
# tests with an engine that tells container names.
ENGINE29 ?= /var/tmp/oam-docker-ipam-engine29/dockerd
soak:
	@./test/install test
	OAM_SOAK=1 $(GO) test -timeout 3h -count 1 ./test/...
	@./test/build-engine $(ENGINE29)
	OAM_DOCKERD=$(ENGINE29) $(GO) test -timeout 30m -count 1 ./test/e2e

clean:
	rm -f oam-docker-ipam
