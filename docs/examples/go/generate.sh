#!/usr/bin/env bash
# Generate the package hashlensv1 from the protos: generate.sh [PROTOS]
#
# Needs Go and a Python with grpcio-tools and googleapis-common-protos, whose compiler and
# google/rpc/status.proto are used; PYTHON names it, else it is this repository's .venv.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
protos=$(realpath "${1:-$here/../../../protos}")
python=${PYTHON:-$here/../../../.venv/bin/python}
plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT

# Of the versions that go.mod names.
(cd "$here" && GOBIN=$plugins go install tool)
common=$("$python" -c \
  'import importlib.util as u; print([*u.find_spec("google.rpc").submodule_search_locations][0])')

# The protos name no Go package, because they serve all languages: it is said here.
module=$(cd "$here" && go list -m)
files=(embedding encoder_service search_service)
options=()
for file in "${files[@]}"; do
  options+=("--go_opt=Mhashlens/v1/$file.proto=$module/hashlensv1")
  options+=("--go-grpc_opt=Mhashlens/v1/$file.proto=$module/hashlensv1")
done
protos_of_package=("${files[@]/#/hashlens/v1/}")
protos_of_package=("${protos_of_package[@]/%/.proto}")
rm -rf "$here/hashlensv1"
PATH=$plugins:$PATH "$python" -m grpc_tools.protoc "-I$protos" "-I${common%/google/rpc}" \
  "--go_out=$here" "--go_opt=module=$module" "--go-grpc_out=$here" "--go-grpc_opt=module=$module" \
  "${options[@]}" "${protos_of_package[@]}"
