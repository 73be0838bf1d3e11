"""The web page: a form made from the schema, and pictures that sharpen while one waits."""
