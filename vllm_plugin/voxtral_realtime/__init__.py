"""Two realtime protocols that clients already speak, OpenAI's and Mistral's, spoken by the server.

`core` makes words, times and items of a socket's audio; `openai` and `mistral` only translate. `engine` holds the
sessions, `audio` decodes and resamples, `routes` adds all this to vLLM. The specification is in PROTOCOL.md.
"""
