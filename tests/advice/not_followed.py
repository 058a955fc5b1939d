NOT_FOLLOWED: dict[str, tuple[str, ...]] = {}
