"""One module for each command: HELP, EXAMPLE, ``arguments(parser)`` and ``run(args)``.

None imports torch before ``run``, so that ``mixdq --help`` is instant.
"""
