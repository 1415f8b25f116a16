"""Parts of the study of strategies: data, runs, and what their results say."""
