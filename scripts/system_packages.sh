#!/usr/bin/env bash
# Installs the Debian packages that a few tests need: chromium (tests/report opens its page in it) and iproute2 (tests/link
# joins network namespaces). Only what is missing; needs root. scripts/test.sh leaves those tests out where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v ip >/dev/null && command -v tc >/dev/null || missing+=(iproute2)
((${#missing[@]})) || exit 0
say "installing ${missing[*]}"
command -v apt-get >/dev/null || fail "no apt-get here; install ${missing[*]} with this system's package manager"
((EUID == 0)) || fail "not root; run: sudo apt-get install ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o Acquire::Retries=3 update
apt-get -qq -y --no-install-recommends -o Acquire::Retries=3 install "${missing[@]}" >/dev/null
