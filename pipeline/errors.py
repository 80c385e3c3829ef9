"""What the pipeline raises for people; `pipeline.artifacts` gives the same names."""


class PipelineError(Exception):
    """Something a person can mend: the message says what was found, what was wanted and what to do."""


class MissingArtifact(PipelineError):
    """An artifact that a stage reads is not there, or was never completed."""
