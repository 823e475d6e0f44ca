"""Reading images and sound, writing the growing video. No torch here."""
