// The microphone as blocks of PCM16, and its errors in words.

import { RATE } from "./transcriber.js";

const FAULTS = { // of `Microphone.open`
  NotAllowedError: "The browser blocks the microphone for this page: allow it next to the address.",
  NotFoundError: "No microphone was found.",
  OverconstrainedError: "The chosen microphone is not there. Plug it in again, or choose another.",
  NotSupportedError: "This browser cannot record at 16 kHz: update it.",
  NotReadableError: "Another program uses the microphone, or the system blocks it.",
};

/** An exception of `Microphone.open` in words. */
export const explain = ({ name, message }) => FAULTS[name] ?? `The microphone cannot be used (${message || name}).`;

/** Why this page cannot use a microphone, or "". */
export function obstacle() {
  const address = `https://${location.host}${location.pathname}`;
  if (!isSecureContext) return `Browsers allow the microphone only over HTTPS or on localhost. Open ${address} instead.`;
  if (navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode) return "";
  return "This browser cannot record sound: update it.";
}

/** The microphones: [{deviceId, label}]. Labels are empty until the user has allowed the microphone. */
export async function microphones() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices.filter(({ kind, deviceId }) => kind === "audioinput" && deviceId);
}

let ready = null;

/**
 * The AudioContext at 16 kHz with its worklet: the browser resamples. The page makes it early and keeps it, because it
 * could not fetch the code of the worklet while the server is away.
 */
export async function context() {
  if (ready) return ready;
  const made = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
  try {
    if (made.sampleRate !== RATE) throw new DOMException("", "NotSupportedError");
    await made.audioWorklet.addModule(new URL("recorder.js", import.meta.url));
    return ready ??= made;
  } finally {
    if (ready !== made) made.close();
  }
}

/**
 * `on.audio({samples, level, time})`: an Int16Array of 80 ms at 16 kHz, its level in dB, its end by the clock in ms.
 * `on.gone(label)`: the microphone of this name was unplugged.
 */
export class Microphone {
  #stream = null;
  #nodes = null; // {context, source, recorder}
  #turn = 0; // counts `open` and `close`: an earlier `open` that is still waiting gives up

  constructor(on) { this.on = on; }

  /**
   * Use this microphone in place of any other; `deviceId` "" is the system's choice. Returns its name, or "" if another
   * `open` or `close` came meanwhile. Throws what `explain` explains.
   */
  async open(deviceId) {
    this.close();
    const turn = this.#turn;
    // The sound processing that browsers use for calls makes recognition worse.
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    if (deviceId) audio.deviceId = { exact: deviceId };
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio });
      if (turn !== this.#turn) {
        stop(stream);
        return "";
      }
      this.#stream = stream;
      const used = await context();
      const source = used.createMediaStreamSource(stream);
      await used.resume();
      if (turn !== this.#turn) {
        if (!this.#stream) used.suspend().catch(() => {});
        return "";
      }
      this.#listen(used, source);
      return stream.getAudioTracks()[0].label || "the microphone";
    } catch (error) {
      if (turn !== this.#turn) return "";
      this.close();
      throw error;
    }
  }

  #listen(used, source) {
    const recorder = new AudioWorkletNode(used, "recorder", { numberOfOutputs: 0 });
    recorder.port.onmessage = ({ data }) => this.on.audio(data);
    source.connect(recorder);
    // A call on a phone suspends it, for example.
    used.onstatechange = () => { if (used.state !== "running") used.resume().catch(() => {}); };
    const [track] = this.#stream.getAudioTracks();
    track.onended = () => {
      this.close();
      this.on.gone(track.label);
    };
    this.#nodes = { context: used, source, recorder };
  }

  close() {
    this.#turn++;
    if (this.#stream) stop(this.#stream);
    this.#stream = null;
    if (!this.#nodes) return;
    const { context: used, source, recorder } = this.#nodes;
    this.#nodes = null;
    source.disconnect();
    recorder.port.onmessage = null;
    recorder.port.postMessage("end");
    used.onstatechange = null;
    used.suspend().catch(() => {});
  }
}

function stop(stream) {
  stream.getTracks().forEach((track) => { track.onended = null; track.stop(); });
}
