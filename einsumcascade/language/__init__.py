"""The cascade language: grammar, parser, IR, operators, printer and checks."""
