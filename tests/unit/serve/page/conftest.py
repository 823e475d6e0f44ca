"""The server of `serve_api` for each test of the page's routes."""

from serve_api import empty_database as empty_database
from serve_api import serve as serve
