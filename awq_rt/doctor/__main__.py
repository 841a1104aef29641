"""`python -m awq_rt.doctor [MODEL]`: the report as JSON, where a library of the command line is what is broken."""

from __future__ import annotations

import json
import sys

from . import Request, diagnose


def main() -> int:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    report = diagnose(Request(model=model))
    print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    return int(report.verdict)


if __name__ == "__main__":
    sys.exit(main())
