# The two that a newcomer needs:
#   make demo   see it work, in network namespaces of its own
#   make test   run every test there is
# Both install what is missing (as root, by apt-get or dnf).
#
#   make rpm, make deb   packages, into rpms/ and debs/
#   make install         all that is in them, without a package

VERSION   = $(shell sed -n 's/^[a-z \t]*version *= "\(.*\)"$$/\1/p' main.go)
# The commit, and whether the tree differs from it.
REVISION  = $(shell [ ! -e .git ] || echo "$$(git rev-parse HEAD)$$(git status --porcelain | sed -n 1s/.*/-dirty/p)")
FUZZTIME ?= 400000x
GO       ?= go
# The product's packages, whose tests take seconds.
UNITS    := . ./arp ./conf ./dhcp ./doctor ./engine ./host ./lease ./metrics ./server ./store ./systemd ./test/demo/dhcpd

# Nothing in the binary tells where or when it was built.
BUILD     = -trimpath -buildvcs=false -ldflags '-s -w -buildid= -X main.version=$(VERSION) -X main.revision=$(REVISION)'
# What is built goes here.
OUT       = .

# Where install puts things; packages have DESTDIR in front. The daemon reads
# /etc/oam-docker-ipam.conf unless its --config says otherwise.
PREFIX      = /usr
BINDIR      = $(PREFIX)/bin
SYSCONFDIR  = /etc
UNITDIR     = $(PREFIX)/lib/systemd/system
SYSUSERSDIR = $(PREFIX)/lib/sysusers.d
MANDIR      = $(PREFIX)/share/man
DOCDIR      = $(PREFIX)/share/doc/oam-docker-ipam
LICENSEDIR  = $(PREFIX)/share/licenses/oam-docker-ipam
BASHDIR     = $(PREFIX)/share/bash-completion/completions
ZSHDIR      = $(PREFIX)/share/zsh/site-functions
UNITS_OF_SYSTEMD := oam-docker-ipam.socket oam-docker-ipam.service oam-docker-ipam-reconcile.service oam-docker-ipam-reconcile.timer

.PHONY: build completions licences built install rpm deb version revision demo test race lint fuzz bench soak clean

build:
	CGO_ENABLED=0 $(GO) build $(BUILD) -o $(OUT)/oam-docker-ipam .

# By the binary, or where that is for another machine, by one for this one.
completions: build
	mkdir -p $(OUT)/completions
	run=$(OUT)/oam-docker-ipam; \
	[ "$$($(GO) env GOOS GOARCH)" = "$$(GOOS= GOARCH= $(GO) env GOOS GOARCH)" ] || run='env GOOS= GOARCH= $(GO) run .'; \
	for shell in bash zsh; do $$run completion $$shell >$(OUT)/completions/$$shell || exit 1; done

# The licences of what is compiled in.
licences:
	mkdir -p $(OUT)/licences
	$(GO) list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' . | sort -u >$(OUT)/licences/list
	{ \
		echo 'The Go standard library' && cat "$$($(GO) env GOROOT)/LICENSE"; \
		while read -r path version folder; do \
			echo && echo "==== $$path $$version" && \
			for file in "$$folder"/LICENSE "$$folder"/LICENSE.txt "$$folder"/LICENSE.md "$$folder"/NOTICE; do \
				if [ ! -e "$$file" ]; then :; \
				elif grep -q 'Apache License' "$$file"; then echo 'Apache License, version 2.0'; \
				else cat "$$file"; fi; \
			done; \
		done <$(OUT)/licences/list; \
	} >$(OUT)/licences/LICENSE.modules

# What a root who has no Go installs.
BUILT = $(OUT)/oam-docker-ipam $(OUT)/completions/bash $(OUT)/completions/zsh $(OUT)/licences/LICENSE.modules
built:
	@ls $(BUILT) >/dev/null || { echo 'There is no $(GO) here to build them. Build them first, as a user who has it: make completions licences' >&2; exit 1; }

# Where things are, for what names them.
PLACES = sed -e 's|/usr/bin/oam-docker-ipam|$(BINDIR)/oam-docker-ipam|g' -e 's|/usr/share/doc/oam-docker-ipam|$(DOCDIR)|g'

# A configuration that is there stays.
install: $(if $(shell command -v $(GO)),completions licences,built)
	install -D -m 755 $(OUT)/oam-docker-ipam $(DESTDIR)$(BINDIR)/oam-docker-ipam
	[ -e $(DESTDIR)$(SYSCONFDIR)/oam-docker-ipam.conf ] || install -D -m 644 conf/oam-docker-ipam.conf $(DESTDIR)$(SYSCONFDIR)/oam-docker-ipam.conf
	install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(MANDIR)/man8
	for unit in $(UNITS_OF_SYSTEMD); do \
		$(PLACES) systemd/$$unit >$(DESTDIR)$(UNITDIR)/$$unit && \
		chmod 644 $(DESTDIR)$(UNITDIR)/$$unit || exit 1; \
	done
	install -D -m 644 systemd/oam-docker-ipam.sysusers $(DESTDIR)$(SYSUSERSDIR)/oam-docker-ipam.conf
	$(PLACES) rpm/oam-docker-ipam.8 | gzip -9n >$(DESTDIR)$(MANDIR)/man8/oam-docker-ipam.8.gz
	chmod 644 $(DESTDIR)$(MANDIR)/man8/oam-docker-ipam.8.gz
	install -D -m 644 $(OUT)/completions/bash $(DESTDIR)$(BASHDIR)/oam-docker-ipam
	install -D -m 644 $(OUT)/completions/zsh $(DESTDIR)$(ZSHDIR)/_oam-docker-ipam
	install -d $(DESTDIR)$(DOCDIR)
	install -m 644 README.md CHANGELOG.md contrib/grafana-dashboard.json contrib/alerts.yml $(DESTDIR)$(DOCDIR)
	install -D -m 644 -t $(DESTDIR)$(DOCDIR)/docs docs/JSON.md
	$(PLACES) systemd/broadcast.conf >$(DESTDIR)$(DOCDIR)/broadcast.conf
	chmod 644 $(DESTDIR)$(DOCDIR)/broadcast.conf
	install -d $(DESTDIR)$(LICENSEDIR)
	install -m 644 LICENSE $(OUT)/licences/LICENSE.modules $(DESTDIR)$(LICENSEDIR)
	@[ '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || printf '%s\n' 'Installed. What is left to do:' \
		systemd-sysusers 'systemctl daemon-reload' 'systemctl enable --now oam-docker-ipam'

# What sorts before a release has ~ in a package's version.
rpm:
	./build-rpm.sh oam-docker-ipam '$(subst -,~,$(VERSION))'

deb:
	./build-deb.sh oam-docker-ipam '$(subst -,~,$(VERSION))'

# For the scripts.
version:
	@echo '$(VERSION)'

revision:
	@echo '$(REVISION)'

demo: build
	@./test/install demo
	@$(GO) run ./test/demo

# Packages and booted machines come last, and not beside the end to end tests:
# they keep every processor busy, and leases of a second don't wait.
test:
	@./test/install test machine
	packages=$$($(GO) list ./... | grep -v -e /test/packages -e /test/machine) && $(GO) test -timeout 20m $$packages
	$(GO) test -timeout 20m ./test/packages ./test/machine

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
	@./test/install test machine
	OAM_SOAK=1 $(GO) test -p 1 -timeout 3h -count 1 ./test/...
	@./test/build-engine $(ENGINE29)
	OAM_DOCKERD=$(ENGINE29) $(GO) test -timeout 30m -count 1 ./test/e2e

clean:
	rm -rf oam-docker-ipam completions licences rpms debs
