"""One short file a published method. Each makes five choices: layout, visibility, feedback, objectives, curriculum."""
