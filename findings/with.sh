# Sourced by the findings: `run_with PACKAGE==VERSION ... <<'PYTHON'` runs a script in a new environment in a temporary folder,
# with nothing installed but these packages and what they need. Both are gone afterwards.
set -eu

run_with() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cat > "$folder/finding.py"
    "${PYTHON:-python3}" -m venv --without-pip "$folder/venv"
    "${PYTHON:-python3}" -m pip --python "$folder/venv/bin/python" install --quiet --disable-pip-version-check "$@"
    cd "$folder"
    "$folder/venv/bin/python" finding.py
}
