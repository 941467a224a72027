#!/usr/bin/env bash
# The name under which users know scripts/pretrain_mixtral_8x7b.sh: the same script, edit that one.
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_mixtral_8x7b.sh" "$@"
