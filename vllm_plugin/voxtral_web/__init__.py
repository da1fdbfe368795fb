"""The browser's way in: the captions page, and the guard of the WebSocket. See `page` and `guard`."""
