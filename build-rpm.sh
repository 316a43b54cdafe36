#!/usr/bin/env bash
# Builds the RPM packages:
#
#   ./build-rpm.sh                          of the tree's own version
#   ./build-rpm.sh oam-docker-ipam 3.0.0    of another
#   GOARCH=arm64 ./build-rpm.sh             for another machine than this one
#
# leaves rpms/oam-docker-ipam-VERSION-1.ARCH.rpm and the source package beside
# it. The same source makes the same bytes. Needs rpmbuild and Go, and no network
# once Go has the modules in its cache.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/packages.sh"

need rpmbuild rpm rpm-build
prepare "$@"
case $GOARCH in
amd64) arch=x86_64 ;;
arm64) arch=aarch64 ;;
ppc64le | s390x | riscv64) arch=$GOARCH ;;
*) die "GOARCH=$GOARCH: want amd64, arm64, ppc64le, s390x or riscv64" ;;
esac

# sources lists the tree's files, each with a NUL behind it: what git knows or
# would take. Where there is no git, all but what the build makes.
sources() {
	if [ -e .git ]; then
		git ls-files -z --cached --others --exclude-standard
	else
		find . -type f -not -path './rpms/*' -not -path './debs/*' -not -path './completions/*' -not -path './licences/*' -not -path ./oam-docker-ipam -printf '%P\0'
	fi | while IFS= read -r -d '' file; do
		if [ -e "$file" ]; then printf '%s\0' "$file"; fi
	done
}

mkdir "$scratch/SPECS" "$scratch/SOURCES" "$scratch/tmp"
(
	cd "$tree"
	sources | sort -z | tar --create --format=gnu --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--mtime="@$SOURCE_DATE_EPOCH" --transform="s,^,oam-docker-ipam-$version/,S" \
		--no-recursion --null --files-from=- | gzip -9n >"$scratch/SOURCES/oam-docker-ipam-$version.tar.gz"
)
install -m 644 "$tree/systemd/oam-docker-ipam.sysusers" "$scratch/SOURCES/"
# In the spec what only this script knows, so that the source package can be
# built without it.
{
	echo "%global package_version $version"
	echo "%global revision ${revision:-%nil}"
	cat "$tree/rpm/oam-docker-ipam.spec"
	echo
	echo %changelog
	echo "* $(date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y') The oam-docker-ipam developers - $version-1"
	echo "- See CHANGELOG.md"
} >"$scratch/SPECS/oam-docker-ipam.spec"

# _rpmformat: also a newer rpm makes packages that older ones read.
# --nodeps: an rpm database isn't where Debian keeps make and Go.
attend rpmbuild -ba --quiet --nodeps --target "$arch" \
	--define "_topdir $scratch" \
	--define "_tmppath $scratch/tmp" \
	--define '_rpmformat 4' \
	--define '_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
	--define '_srcdefattr (-,root,root)' \
	--define '_buildhost localhost' \
	--define 'packager The oam-docker-ipam developers <talkingdata@users.noreply.github.com>' \
	--define 'use_source_date_epoch_as_buildtime 1' \
	--define 'clamp_mtime_to_source_date_epoch 1' \
	--define 'source_date_epoch_from_changelog 0' \
	"$scratch/SPECS/oam-docker-ipam.spec"

mkdir -p "$tree/rpms"
for package in "$scratch"/RPMS/*.rpm "$scratch"/SRPMS/*.rpm; do
	mv -f "$package" "$tree/rpms/"
	echo "rpms/${package##*/}"
done
