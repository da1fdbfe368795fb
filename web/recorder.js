// AudioWorklet: the sound of the microphone in blocks of 80 ms, PCM16 mono, with their level and the time of their end:
// that of the calendar, because worklets have no performance.now(), and because it must count while the system sleeps.

const BLOCK = 1280;

class Recorder extends AudioWorkletProcessor {
  #block = new Int16Array(BLOCK);
  #filled = 0;
  #power = 0;
  #over = false;

  constructor() {
    super();
    this.port.onmessage = () => { this.#over = true; };
  }

  process([channels]) {
    if (this.#over) return false; // else it would run as long as the context
    if (!channels.length) return true; // no microphone is connected
    for (let i = 0; i < channels[0].length; i++) {
      const sample = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
      this.#power += sample * sample;
      this.#block[this.#filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#filled < BLOCK) continue;
      const level = 10 * Math.log10(this.#power / BLOCK + 1e-10);
      this.port.postMessage({ samples: this.#block, level, time: Date.now() }, [this.#block.buffer]);
      this.#block = new Int16Array(BLOCK);
      this.#filled = this.#power = 0;
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
