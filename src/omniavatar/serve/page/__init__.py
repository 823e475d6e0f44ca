"""The page of `omniavatar web`: routes beside the API, and in `static/` the files of the page."""
