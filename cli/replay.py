"""``generate --from-metadata``: a picture that was made before."""


class Replay:
    """The settings that a picture carries, and whether it can be drawn again here."""

    def __init__(self, source: str):
        from snapgen_mlx.picture_file import read_metadata

        self.source, self.found = source, read_metadata(source)

    def check_given(self, given: dict) -> None:
        """Raise UsageError when a file that the picture needs is not among what was given."""
        from snapgen_mlx.errors import UsageError

        for option, here in given.items():
            if self.found.get(option) and not here:
                value = self.found[option]
                names = " ".join(value) if option == "loras" else value
                flag = option.rstrip("s").replace("_", "-")
                raise UsageError(f"{self.source} was made with --{flag} {names}; give it again")

    def complete(self, given: dict) -> dict:
        """What was given, and for the rest what the picture was made with."""
        own = {name: self.found.get(name) for name in (*given, "shift")}
        return own | {k: v for k, v in given.items() if v is not None}

    def check(self, here: dict, base: bool) -> list[str]:
        """Compare with the metadata of what is to be drawn.

        Args:
            here: the metadata.
            base: whether --base was given.

        Returns:
            What may make another picture, one line each.

        Raises:
            UsageError: a part differs that makes another picture for certain.
        """
        from snapgen_mlx.errors import UsageError
        from snapgen_mlx.ingredients import differences

        if differ := differences(self.found, here, base):
            raise UsageError(
                f"{self.source} was drawn with {' and '.join(differ)}; name its own with -m, "
                "--lora or --text-encoder, or give the prompt and --seed instead"
            )
        if "digests" not in self.found:
            return [f"{self.source} does not say which weights drew it; these may be others"]
        before, now = self.found.get("version"), here["version"]
        if before != now:
            return [f"{self.source} was drawn by version {before}, and this is {now}"]
        return []
