#!/usr/bin/env bash
# Builds the Debian package:
#
#   ./build-deb.sh                          of the tree's own version
#   ./build-deb.sh oam-docker-ipam 3.0.0    of another
#   GOARCH=arm64 ./build-deb.sh             for another machine than this one
#
# leaves debs/oam-docker-ipam_VERSION-1_ARCH.deb. The same source makes the same
# bytes. Needs dpkg-deb and Go, and no network once Go has the modules in its
# cache.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/packages.sh"

need dpkg-deb dpkg dpkg
prepare "$@"
case $GOARCH in
amd64 | arm64 | s390x | riscv64) arch=$GOARCH ;;
ppc64le) arch=ppc64el ;;
*) die "GOARCH=$GOARCH: want amd64, arm64, ppc64le, s390x or riscv64" ;;
esac

root=$scratch/root
doc=$root/usr/share/doc/oam-docker-ipam
# Debian's zsh looks elsewhere, and a licence is a copyright file.
attend make -s -C "$tree" install OUT="$scratch" DESTDIR="$root" VERSION="${version//\~/-}" REVISION="$revision" \
	ZSHDIR=/usr/share/zsh/vendor-completions LICENSEDIR=/licence
{
	cat "$tree/deb/copyright"
	sed -e '/./!s/^/./' -e 's/^/ /' "$root/licence/LICENSE.modules"
} >"$doc/copyright"
rm -r "$root/licence"
install -D -m 644 "$tree/deb/lintian-overrides" "$root/usr/share/lintian/overrides/oam-docker-ipam"
gzip -9n <"$doc/CHANGELOG.md" >"$doc/changelog.gz"
rm "$doc/CHANGELOG.md"
gzip -9n >"$doc/changelog.Debian.gz" <<END
oam-docker-ipam ($version-1) unstable; urgency=medium

  * See changelog.gz.

 -- The oam-docker-ipam developers <talkingdata@users.noreply.github.com>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END

control=$root/DEBIAN
install -d "$control"
install -m 755 "$tree"/deb/{postinst,prerm,postrm} "$control/"
echo /etc/oam-docker-ipam.conf >"$control/conffiles"
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$control/md5sums"
sed -e "s/@VERSION@/$version-1/" -e "s/@ARCH@/$arch/" \
	-e "s/@SIZE@/$(find "$root" -type f -printf '%s\n' | awk '{ k += int(($1 + 1023) / 1024) } END { print k }')/" \
	"$tree/deb/control" >"$control/control"
chmod 644 "$doc/copyright" "$control"/{conffiles,md5sums,control}

# xz, since older dpkgs don't read zstd.
package=oam-docker-ipam_$version-1_$arch.deb
attend dpkg-deb --root-owner-group -Zxz --build "$root" "$scratch/$package" >"$scratch/log" ||
	{ cat "$scratch/log" >&2; exit 1; }
mkdir -p "$tree/debs"
mv -f "$scratch/$package" "$tree/debs/"
echo "debs/$package"
