#!/usr/bin/env bash
# Fetch one part of LibriTTS, check it, and unpack it.
#
# In:   <url>/<part>.tar.gz, md5sums.txt beside this file (or MD5SUMS)
# Out:  <folder>/LibriTTS/<part>/<speaker>/<chapter>/*.wav, and .complete in <folder>/LibriTTS/<part>
#
#     bash download_and_untar.sh [--remove-archive] /data https://www.openslr.org/resources/60 dev-clean
#
# The same command goes on where it was stopped. What is not complete has another name: <part>.tar.gz.part while it is
# fetched, .unpacking-<part> while it is unpacked.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=../../../../cosyvoice/utils/settings.sh
source "$HERE/../../../../cosyvoice/utils/settings.sh"

MD5SUMS="${MD5SUMS:-$HERE/md5sums.txt}"
CANNOT_RESUME=(33 36) # curl's exit codes where the server cannot begin in the middle of a file
NOTHING_LEFT=416 # a server's answer where the file ends before the range begins

# Fetch what is missing of a file. That the server has no more of it is no error: the checksum decides.
fetch() { # URL FILE
    local status=0 code
    echo "fetching $1"
    if command -v curl >/dev/null; then
        run_stoppable curl --fail --location --retry 5 --retry-delay 5 --continue-at - --output "$2" \
            --write-out '%{http_code}' "$1" >"$2.answer" || status=$?
        code="$(<"$2.answer")"
        rm -f -- "$2.answer"
        if [[ " ${CANNOT_RESUME[*]} " == *" $status "* ]]; then
            echo "the server sends files whole only: starting again"
            rm -f -- "$2"
            status=0
            run_stoppable curl --fail --location --retry 5 --retry-delay 5 --output "$2" "$1" || status=$?
        elif [[ "$code" == "$NOTHING_LEFT" && -s "$2" ]]; then
            status=0
        fi
    elif command -v wget >/dev/null; then
        run_stoppable wget --continue --tries 5 --output-document "$2" "$1" || status=$?
    else
        fail "neither curl nor wget is installed; run: apt-get install curl"
    fi
    ((status != 130 && status != 143)) || exit "$status"
    ((status == 0)) || fail "$1 could not be fetched (exit code $status); the same command goes on where it broke off"
}

is_intact() { # FILE MD5
    local found
    found="$(md5sum <"$1")"
    [[ "${found%% *}" == "$2" ]]
}

main() {
    local remove=false folder url part wanted archive unpacking
    [[ "${1:-}" != --remove-archive ]] || { remove=true && shift; }
    (($# == 3)) || fail "expected [--remove-archive] FOLDER URL PART, got $# words"
    folder="$1" url="$2" part="$3"
    [[ -f "$MD5SUMS" ]] || fail "there is no $MD5SUMS"
    wanted="$(awk -v name="$part.tar.gz" '$2 == name { print $1 }' "$MD5SUMS")"
    [[ -n "$wanted" ]] || fail "LibriTTS has no part '$part'; there are: $(awk '{ print $2 }' "$MD5SUMS" | xargs)"
    if [[ -f "$folder/LibriTTS/$part/.complete" ]]; then
        echo "$part: is there already ($folder/LibriTTS/$part)"
        return
    fi
    [[ ! -e "$folder/LibriTTS/$part" ]] ||
        fail "$folder/LibriTTS/$part comes from elsewhere; if it is whole, run: touch $folder/LibriTTS/$part/.complete"

    mkdir -p -- "$folder/LibriTTS"
    archive="$folder/$part.tar.gz"
    if [[ -f "$archive" ]] && ! is_intact "$archive" "$wanted"; then # from elsewhere: perhaps it is only not all of it
        echo "$archive has another checksum than $MD5SUMS says: fetching the rest"
        mv -- "$archive" "$archive.part"
    fi
    if [[ ! -f "$archive" ]]; then
        fetch "$url/$part.tar.gz" "$archive.part"
        if ! is_intact "$archive.part" "$wanted"; then
            rm -f -- "$archive.part"
            fail "$url/$part.tar.gz has another checksum than $MD5SUMS says, and is removed; run the same again"
        fi
        mv -- "$archive.part" "$archive"
    fi

    unpacking="$folder/.unpacking-$part"
    rm -rf -- "$unpacking"
    mkdir -- "$unpacking"
    echo "unpacking $archive"
    run_stoppable tar --extract --gzip --no-same-owner --file "$archive" --directory "$unpacking"
    [[ -d "$unpacking/LibriTTS/$part" ]] || fail "$archive holds no LibriTTS/$part"
    touch -- "$unpacking/LibriTTS/$part/.complete"
    mv -- "$unpacking/LibriTTS/$part" "$folder/LibriTTS/$part"
    rm -rf -- "$unpacking"
    [[ "$remove" == false ]] || rm -- "$archive"
    echo "$part: complete"
}

main "$@"
