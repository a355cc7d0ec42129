"""Make kuberay-v1.7.0.json.gz of the CRDs in a checkout of ray-project/kuberay (Apache-2.0) at tag v1.7.0.

python -m tests.data.kuberay_schema CHECKOUT/ray-operator/config/crd/bases

Kept of RayCluster and RayJob, version v1, is what a manifest can be wrong in: names, types, enums, bounds, patterns.
Left out are status, defaults, descriptions, and the rules in CEL (`x-kubernetes-validations`), which need a server.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).parent / "kuberay-v1.7.0.json.gz"
_KEPT = {"type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}
_OPEN = "x-kubernetes-preserve-unknown-fields"


def pruned(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema in which an object has only the properties it names, as the API server's strict check has it."""
    out = {key: value for key, value in schema.items() if key in _KEPT}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if "properties" in schema:
        out["properties"] = {name: pruned(inner) for name, inner in schema["properties"].items()}
        out["additionalProperties"] = bool(schema.get(_OPEN))
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = pruned(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = pruned(schema["items"])
    return out


def main(folder: Path) -> None:
    found = {}
    for file in ("ray.io_rayclusters.yaml", "ray.io_rayjobs.yaml"):
        crd = yaml.safe_load((folder / file).read_text())["spec"]
        (version,) = (v for v in crd["versions"] if v["name"] == "v1")
        schema = pruned(version["schema"]["openAPIV3Schema"])
        del schema["properties"]["status"]
        found[crd["names"]["kind"]] = schema
    text = json.dumps(found, separators=(",", ":"), sort_keys=True)
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
