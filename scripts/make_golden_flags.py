"""Writes the flags of transformers 4.57.6's TrainingArguments, by name, with their defaults, for the tests.

Run it with an interpreter that has transformers 4.57.6:
    python scripts/make_golden_flags.py > tests/golden/training_args_4_57_6.json
"""

import dataclasses
import json
import sys

import transformers
from transformers import TrainingArguments

if transformers.__version__ != "4.57.6":
    sys.exit(f"this is transformers {transformers.__version__}, the golden file is made with 4.57.6")

fields = [field for field in dataclasses.fields(TrainingArguments) if field.init]
defaults = {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in fields}
print(json.dumps(defaults, indent=1, sort_keys=True, default=str))
