#!/usr/bin/env bash
# deploy/base-image.sh: what the images are built from on a machine that reaches no image registry but has a Debian mirror.
#
# Makes the image espalier/base:3.11 (Debian 12 with python3.11, this machine's CA bundle and its machine-wide pip settings),
# names it in .env as BASE_IMAGE for docker compose, and puts torch's pinned wheel into deploy/wheels. Says nothing where all
# of that is there and current. Exit status: 0 ok, 2 something has to be installed or allowed first, 3 a step failed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly IMAGE=espalier/base:3.11
readonly SUITE=bookworm  # the Debian whose python3 is 3.11
readonly BUNDLE=/etc/ssl/certs/ca-certificates.crt
readonly PIP_CONF=/etc/pip.conf
readonly TORCH=deploy/requirements/torch.txt
readonly WHEELS=deploy/wheels

say() { echo "base-image: $*" >&2; }
stop() { local code=$1; shift; say "$*"; exit "$code"; }

recipe() {  # what the image depends on on this machine, as one word
  cat "$0" "$BUNDLE" "$PIP_CONF" 2> /dev/null | sha256sum | cut -c 1-16
}

image_is_current() {
  [ "$(docker image inspect --format '{{index .Config.Labels "espalier.recipe"}}' "$IMAGE" 2> /dev/null)" = "$(recipe)" ]
}

debian_targets() {  # this machine's Debian sources, one per line: LABEL URI RELEASE COMPONENT
  # shellcheck disable=SC2016  # apt's fields, not ours
  apt-get indextargets --format '$(LABEL) $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian'
}

sources() {  # the same for an image of SUITE, as lines of sources.list
  debian_targets | awk -v suite="$SUITE" '{
    release = $3
    if (!sub(/^[^-\/]+/, suite, release) || $3 ~ /backports|proposed/) next
    print "deb", $2, release, $4
  }' | sort -u
}

need_root_and_tools() {
  [ "$(id -u)" = 0 ] || stop 2 "making $IMAGE needs root: run this script with sudo"
  command -v apt-get > /dev/null || stop 2 "making $IMAGE needs apt; without it, set BASE_IMAGE in .env to any Debian image" \
    "that has python3.11 with venv, and bash"
  [ -n "$(debian_targets)" ] || apt-get update -qq || stop 3 "apt-get update failed"
  command -v debootstrap > /dev/null && return
  say "installing debootstrap"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap > /dev/null || stop 2 "install debootstrap, then run this again"
}

make_root() {  # make_root DIRECTORY: a Debian in it
  local mirror
  mirror=$(debian_targets | awk '$1 == "Debian" {print $2; exit}')
  [ -n "$mirror" ] || stop 2 "apt has no Debian mirror among its sources: add one, or set BASE_IMAGE in .env"
  debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$1" "$mirror" > "$1.log" 2>&1 \
    || { tail -n 20 "$1.log" >&2; stop 3 "debootstrap failed"; }
  sources > "$1/etc/apt/sources.list"
  # Documentation and translations come back with no package that is installed later.
  printf 'path-exclude=/usr/share/%s/*\n' doc man info locale > "$1/etc/dpkg/dpkg.cfg.d/espalier"
  chroot "$1" sh -ec 'export DEBIAN_FRONTEND=noninteractive
      apt-get update -qq; apt-get upgrade -y -qq; apt-get install -y -qq --no-install-recommends python3.11 python3.11-venv' \
    > "$1.log" 2>&1 || { tail -n 20 "$1.log" >&2; stop 3 "python3.11 could not be installed into the image"; }
}

make_small() {  # make_small DIRECTORY
  rm -rf "$1"/usr/share/{doc,man,info,locale}/* "$1"/var/lib/apt/lists/* "$1"/var/cache/{apt,debconf,ldconfig}/* "$1"/var/log/*
  rm -f "$1"/etc/{resolv.conf,hostname}
}

copy_settings() {  # copy_settings DIRECTORY: how this machine reaches its package indexes
  [ ! -s "$BUNDLE" ] || cp -L "$BUNDLE" "$1$BUNDLE"
  {
    printf '[global]\ncert = %s\n' "$BUNDLE"
    # Addresses go along; a directory of this machine would not be there.
    [ ! -r "$PIP_CONF" ] || sed -n -E 's/^[[:space:]]*((index-url|extra-index-url|find-links)[[:space:]]*=[[:space:]]*https?:)/\1/p
      s/^[[:space:]]*((trusted-host|timeout|retries|proxy)[[:space:]]*=)/\1/p' "$PIP_CONF"
  } > "$1$PIP_CONF"
}

make_image() {
  need_root_and_tools
  local root
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  root=$work/root
  mkdir "$root"
  say "making $IMAGE from the Debian mirror (about a minute)"
  make_root "$root"
  make_small "$root"
  copy_settings "$root"
  tar -C "$root" --numeric-owner --exclude './dev/*' --exclude './proc/*' --exclude './sys/*' -c . \
    | docker import --change 'CMD ["python3.11"]' --change "LABEL espalier.recipe=$(recipe)" \
        --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' - "$IMAGE" > /dev/null \
    || stop 3 "docker import failed"
  say "made $IMAGE"
}

name_in_env() {  # the line BASE_IMAGE of .env; all others stay as they are
  local line=BASE_IMAGE=$IMAGE
  if ! grep -qs '^BASE_IMAGE=' .env; then
    [ ! -s .env ] || [ -z "$(tail -c 1 .env)" ] || echo >> .env
    echo "$line" >> .env
  elif ! grep -qxF "$line" .env; then
    sed -i "s|^BASE_IMAGE=.*|$line|" .env
  else
    return 0
  fi
  say "wrote $line to .env"
}

has_wheel() {
  local hashes
  hashes=$(grep -o 'sha256:[0-9a-f]*' "$TORCH" | cut -d : -f 2)
  sha256sum "$WHEELS"/*.whl 2> /dev/null | grep -qF "$hashes"
}

fetch_wheel() {
  local pip
  for pip in ".venv/bin/python -m pip" "python3.11 -m pip" "python3 -m pip"; do
    $pip --version > /dev/null 2>&1 || continue
    say "fetching torch's pinned wheel into $WHEELS"
    $pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: --python-version 3.11 \
      -d "$WHEELS" -r "$TORCH" || say "pip did not find torch's pinned CPU build, so the models image will take the build with CUDA:" \
      "see docs/install.md, 'The torch pin'"
    return
  done
  stop 2 "no pip was found: install python3-pip, or make .venv (make check does), then run this again"
}

[ $# = 0 ] || stop 2 "this script takes no arguments"
docker version > /dev/null 2>&1 || stop 2 "no Docker engine answers: deploy/install-engine.sh gives this machine one"
image_is_current || make_image
name_in_env
has_wheel || fetch_wheel
