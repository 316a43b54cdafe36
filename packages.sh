# What build-rpm.sh and build-deb.sh share; they source it.

say() { echo "${0##*/}: $*" >&2; }
die() { say "$*"; exit 1; }

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LC_ALL=C
umask 022
# What a make that runs this has been told is ours by our arguments.
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES

# need COMMAND APT-PACKAGE DNF-PACKAGE
need() {
	command -v "$1" >/dev/null ||
		die "$1 is missing. Install it: apt-get install $2, or dnf install $3"
}

# prepare [NAME VERSION] checks what the package is to be called and the tools,
# and sets
#
#   version, revision, GOARCH   what is built, of which commit, for what
#   SOURCE_DATE_EPOCH           the time of everything, so that the same source
#                               makes the same bytes
#   scratch                     a folder that goes when the script ends
prepare() {
	local usage="usage: ${0##*/} [oam-docker-ipam VERSION]"
	case $# in
	0 | 2) ;;
	*) die "$usage" ;;
	esac
	if [ $# = 2 ]; then
		[ "$1" = oam-docker-ipam ] || die "the package's name is oam-docker-ipam, not '$1'; $usage"
		[[ $2 =~ ^[0-9]+([.+~]?[A-Za-z0-9]+)*$ ]] ||
			die "'$2' is no version for a package: want a digit, then letters, digits and single . + or ~ between them, such as 3.0.0 or 3.0.0~rc1 (~ is what sorts before the release)"
	fi

	need make make make
	local head
	if [ -e "$tree/.git" ]; then
		need git git git
		head=$(git -C "$tree" rev-parse HEAD 2>&1) || die "git doesn't tell which commit this is: $head"
	fi
	need tar tar tar
	need go golang golang
	local want
	want=$(sed -n 's/^go //p' "$tree/go.mod")
	(cd "$tree" && go version >/dev/null 2>&1) ||
		die "go.mod wants Go $want, and this is $(cd / && go env GOVERSION). Install a newer one: apt-get install golang, dnf install golang, or where these are older, from https://go.dev/dl/"
	export GOOS=linux GOARCH
	GOARCH=$(go env GOARCH)

	version=${2-$(make -s -C "$tree" version | tr - '~')}
	revision=$(make -s -C "$tree" revision)
	if [ -z "${SOURCE_DATE_EPOCH-}" ]; then
		if [ -e "$tree/.git" ]; then
			SOURCE_DATE_EPOCH=$(git -C "$tree" log -1 --format=%ct)
		else
			# In an archive of a commit every file has the commit's time.
			SOURCE_DATE_EPOCH=$(stat -c %Y "$tree/go.mod")
		fi
	fi
	export SOURCE_DATE_EPOCH

	scratch=$(mktemp -d)
	trap finish EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM

	# Of what Go has been told, by the environment or by go env -w, only where it
	# finds what: the rest would be in the bytes.
	unset GOFLAGS GOEXPERIMENT GOFIPS140 GOAMD64 GOARM64 GOPPC64 GORISCV64
	grep -E '^GO(PATH|CACHE|MODCACHE|TOOLCHAIN|PROXY|NOPROXY|PRIVATE|SUMDB|NOSUMDB|INSECURE|AUTH|VCS)=' \
		"$(go env GOENV)" >"$scratch/goenv" 2>/dev/null || :
	export GOENV=$scratch/goenv GOWORK=off
}

# finish ends what attend runs and clears the scratch folder.
finish() {
	local status=$?
	trap - EXIT
	trap '' HUP INT TERM
	if [ "${attended-}" ]; then
		kill -- "-$attended" 2>/dev/null || :
		wait "$attended" 2>/dev/null || :
	fi
	rm -rf "$scratch"
	exit $status
}

# attend runs a command in a process group of its own, so that an interrupt ends
# all of it and is heeded at once. Bash waits for a command in the foreground.
attend() {
	set -m
	"$@" &
	attended=$!
	set +m
	local status=0
	wait "$attended" || status=$?
	attended=
	return $status
}
