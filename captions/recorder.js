// AudioWorklet: the sound of the microphone in blocks of 80 ms, PCM16 at 16 kHz mono, with their level.
// If the context has another rate (in older Firefox that of the device), the sound is filtered and resampled here.

const RATE = 16000;
const BLOCK = 1280;
const LOBES = 16; // of the windowed sinc, on each side

class Recorder extends AudioWorkletProcessor {
  #block = new Int16Array(BLOCK);
  #filled = 0;
  #power = 0;
  #over = false;
  #resample = sampleRate === RATE ? (samples) => samples : resampler(sampleRate);

  constructor() {
    super();
    this.port.onmessage = () => { this.#over = true; };
  }

  process([channels]) {
    if (this.#over) return false; // else it would run as long as the context
    if (!channels.length) return true; // no microphone is connected
    const mono = channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
    for (const sample of this.#resample(mono)) {
      this.#power += sample * sample;
      this.#block[this.#filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#filled === BLOCK) {
        const level = 10 * Math.log10(this.#power / BLOCK + 1e-10);
        this.port.postMessage({ samples: this.#block, level }, [this.#block.buffer]);
        this.#block = new Int16Array(BLOCK);
        this.#filled = this.#power = 0;
      }
    }
    return true;
  }
}

/** Return a function that converts the next samples at `rate` into the next ones at 16 kHz. */
function resampler(rate) {
  const common = gcd(rate, RATE);
  const up = RATE / common; // samples out ...
  const down = rate / common; // ... for so many samples in
  const stretch = Math.max(1, down / up);
  const half = Math.ceil(LOBES * stretch);
  const filters = Array.from({ length: up }, (_, n) => filter(((n * down) % up) / up, half, stretch));
  let waiting = new Float32Array(2 * half); // silence before the first sample
  let n = 0; // number of the next output sample, modulo `up`
  let at = 0; // its position in `waiting`, in whole samples
  return (samples) => {
    const input = new Float32Array(waiting.length + samples.length);
    input.set(waiting);
    input.set(samples, waiting.length);
    const output = [];
    while (at + 2 * half <= input.length) {
      const taps = filters[n];
      let sum = 0;
      for (let i = 0; i < 2 * half; i++) sum += taps[i] * input[at + i];
      output.push(sum);
      at += Math.floor(((n + 1) * down) / up) - Math.floor((n * down) / up);
      n = (n + 1) % up;
    }
    waiting = input.slice(at);
    at = 0;
    return output;
  };
}

/** Taps of a low pass for a point `phase` (0 to 1) after the middle tap, with a Hann window; their sum is 1. */
function filter(phase, half, stretch) {
  const taps = Float32Array.from({ length: 2 * half }, (_, i) => {
    const x = (i - half + 1 - phase) / stretch; // in lobes
    const window = Math.abs(x) < LOBES ? Math.cos((Math.PI * x) / LOBES / 2) ** 2 : 0;
    return window * (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
  });
  const sum = taps.reduce((a, b) => a + b);
  return taps.map((tap) => tap / sum);
}

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

registerProcessor("recorder", Recorder);
