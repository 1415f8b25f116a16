"""Train, look and export in five lines."""

from dist_ft import fine_tune

run = fine_tune("tickets.yaml", overrides=["name=notebook"])
if run.is_main:  # with several ranks, one goes on
    scores = run.scores()  # {"kind": {"loss": ..., "accuracy": ...}}
    page = run.report()  # runs/notebook/report/index.html
    folders = run.export()  # plain transformers folders, one for each task
