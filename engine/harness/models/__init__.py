"""What LMMS_EVAL_PLUGINS=engine.harness offers: a model's name, which is its file's, and its class."""

AVAILABLE_MODELS = {"sotto": "Sotto"}
