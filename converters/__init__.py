"""Converters: one foreign format, one module.

To add a format, write ``converters/FORMAT.py`` with

``NAME``
    what it is called in ``--from`` and in a file's ``origin``: the module's name.
``DESCRIPTION``
    what is recognised, in a phrase: it is shown by ``lora-state formats`` and where nothing was recognised.
``detect(path: Path) -> Match | None``
    whether an existing file or folder is of this format. Look at names, magic bytes and headers, at most one folder
    deep; read no tensor, run nothing, import no framework. ``Match.reason`` says what was found, ``Match.path``
    what is to be read. Mark the match ``generic`` if other writers leave the same signs.
``read(match: Match, options: Mapping[str, Any]) -> Checkpoint``
    the state at ``match.path`` with its tensors as byte ranges: nothing is decoded, cast or copied here. A format that
    has names makes an ``OptimizerState``; one that has ids makes a ``PositionalState`` and leaves the naming to the
    core. Slots get their ``Role`` from the optimizer's description; ``OPAQUE`` where it is unknown.
``write(state, path, *, base, force, options)``
    only if the format can hold the state exactly; raise ``UnrepresentableError`` for what it cannot hold. ``base`` is a
    checkpoint of the format to take the rest from (``--base``), or ``None``.
``glance(match, options) -> Checkpoint``
    only if a folder may have thousands of files: what ``read`` returns, from a few of them, for ``inspect``. Its
    tensors read from ``model.sources.Unread``; ``origin["first_look"]`` says how many files were read (``io.files``).
``OPTIONS``
    only if something has to be told that no file says: a mapping from key to what it means (``--option KEY=VALUE``).
    ``options`` holds those that were given.

then add one row to ``registry.BUILT_IN``, one to the table in ``README.md``, and tests with checkpoints that the real
framework wrote. Naming, checks, reports, the command line and the API come by themselves.

A converter imports the core by absolute names and never another converter; the core reaches it through the registry
only. ``lora_state_format.foreign`` reads what other software writes; a pickle is read by its ``pickles``, which runs
nothing. A package of its own registers a converter under the entry-point group ``lora_state_format.converters``
instead.
"""
