"""What LMMS_EVAL_PLUGINS=engine.exams.harness offers: a model's name, which is its file's, and its class."""

AVAILABLE_MODELS = {"sotto": "Sotto"}
