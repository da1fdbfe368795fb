"""What the server adds to vLLM's HTTP: the captions page (`page`), uploads (`upload`), access control (`guard`)."""
