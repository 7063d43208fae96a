#!/usr/bin/env bash
# Run one load: run.sh SCENARIO [SHAPE]
#
# SCENARIO is a file of scenarios/, SHAPE an entry of shapes.json (smoke unless said otherwise). Fails
# with 1 if a threshold of thresholds.json is missed, with 2 if there was nothing to compare: a service
# is away, say. What can be set by the environment: README.md.
set -euo pipefail
# Until the gate speaks: Python and ghz end with 1 as well.
trap 'exit 2' ERR

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
scenario=$1
shape=${2:-smoke}
out=${HASHLENS_GHZ_OUT:-$root/build/ghz}
data=${HASHLENS_GHZ_DATA:-$out/data}
thresholds=${HASHLENS_GHZ_THRESHOLDS:-$here/thresholds.json}

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=$root/.venv/bin/python
  [ -x "$python" ] || python=python3
fi
ghz=${GHZ:-}
if [ -z "$ghz" ]; then
  ghz=$root/.tools/bin/ghz
  [ -x "$ghz" ] || ghz=$(command -v ghz) || {
    echo "ghz is not there: \`make ghz\` installs it with Go, or name it with GHZ=..." >&2
    exit 2
  }
fi

# Configurations hold the bearer token, and so does what ghz writes: both stay in here, where nobody
# else reads.
private=$(mktemp -d)
trap 'rm -rf "$private"' EXIT

"$python" "$here/config.py" "$scenario" "$shape" --data "$data" >"$private/run.json"
"$python" "$here/config.py" "$scenario" "$shape" --data "$data" --warmup >"$private/warmup.json"

mkdir -p "$out"
"$python" "$here/data.py" --output "$data" ${HASHLENS_GHZ_ITEMS:+--items "$HASHLENS_GHZ_ITEMS"}

"$ghz" --config "$private/warmup.json" >"$private/thrown-away.json"
"$ghz" --config "$private/run.json" >"$private/report.json"

"$python" "$here/report.py" "$private/report.json" "$scenario" "$shape" "$out/$scenario-$shape" \
  --thresholds "$thresholds"
case ${HASHLENS_GHZ_PRINT:-} in
  "" | 0 | false | no | off) ;;
  *) cat "$out/$scenario-$shape.json" ;;
esac
echo "$scenario $shape: $out/$scenario-$shape.html"
trap - ERR
"$python" "$here/check.py" "$out/$scenario-$shape.json" "$scenario" "$shape" \
  --thresholds "$thresholds"
