"""Operations of the hot path, each with an eager reference and a test."""
