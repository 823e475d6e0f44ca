"""Files of the page that `omniavatar live --serve` shows."""
