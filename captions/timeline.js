// State of one transcription: audio received, transcribed and committed; partial and final words. No DOM, no clock.
// This is voxtral_client/timeline.py in JavaScript: its docstrings explain the rules, and a test compares the two.
// Positions are samples of the input at 16 kHz, across all sessions. A word is {text, start, end, session}: the text
// has its leading space, times are in seconds.

export const RATE = 16000;
export const FRAME = 1280; // samples behind one delta: 80 ms
const HOP = 320; // samples of one level reading: 20 ms
const MARGIN = 4 * FRAME; // the text of a word begins up to 0.2 s after its end
const PAUSE = 3 * FRAME; // silence required on both sides of a commit point
const MAX_PARTIAL = 30 * RATE; // longest audio without a commit point; then one is set between two words
export const WORDLESS_SECONDS = 1.5; // sound without a word that may be a cough
const NEAR = RATE / 2; // what is loud so near to a pause, or before the end of a word, is the voice
const MAX_WORD = 2 * RATE; // the start of a word is at most so far before its end
const FLOOR_DB = -65; // below this everything is silence
// Chinese and Japanese are written without spaces; Korean is not.
const UNSPACED =
  /[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\u{20000}-\u{3ffff}]/u;

export class Timeline {
  committed = 0; // text before this sample is final
  session = 0; // number of the current session
  partial = []; // words after `committed`: a new session would replace them
  received = 0; // end of the audio so far
  #final = []; // final words not yet taken
  #lastEnd = 0; // end of the last final word
  #spoken = ""; // the last character of the final text
  #blocks = []; // audio kept: {start, samples}
  #levels = [];
  #levelsStart = 0; // position of the first level reading
  #floor = FLOOR_DB;
  #edge = FLOOR_DB;
  #noiseAt = -RATE;
  #origin = 0;
  #frames = 0;
  #lastText = 0; // position of the last delta with text
  #blanks = null; // [start, end] of audio without words that a second session must confirm

  get transcribed() { return this.#origin + this.#frames * FRAME; }
  get sessionLength() { return this.#frames * FRAME; }

  // --- audio ---

  /** Append an Int16Array. */
  addAudio(samples) {
    this.#blocks.push({ start: this.received, samples });
    this.received += samples.length;
    let from = this.#levelsStart + this.#levels.length * HOP;
    const audio = this.audio(from, this.received - from);
    for (let i = 0; i + HOP <= audio.length; i += HOP) {
      let power = 0;
      for (let k = i; k < i + HOP; k++) power += (audio[k] / 32768) ** 2;
      this.#levels.push(10 * Math.log10(power / HOP + 1e-10));
    }
  }

  /** Return up to `count` kept samples from `start` on. */
  audio(start, count) {
    const end = Math.min(start + count, this.received);
    const out = new Int16Array(Math.max(0, end - start));
    for (let i = this.#blocks.length - 1; i >= 0; i--) { // the requested audio is near the end
      const { start: at, samples } = this.#blocks[i];
      if (at + samples.length <= start) break;
      if (at >= end) continue;
      const part = samples.subarray(Math.max(0, start - at), end - at);
      out.set(part, Math.max(at, start) - start);
    }
    return out;
  }

  /** Keep at most `keep` samples of audio not yet committed; return the span [start, end) lost for good, or null. */
  dropOldest(keep) {
    const start = this.received - keep;
    if (start <= this.committed) return null;
    const lost = Math.max(this.committed, Math.min(this.transcribed, start));
    this.#commit(start, this.partial.filter((word) => word.end * RATE <= start).length);
    return start > lost ? [lost, start] : null;
  }

  // --- sessions ---

  /** Start a new session: forget the partial words, return the position from which to send audio. */
  begin() {
    this.session++;
    this.partial = [];
    this.#origin = this.#lastText = this.committed;
    this.#frames = 0;
    return this.#origin;
  }

  /** Add the next delta. */
  addDelta(text) {
    this.#frames++;
    const now = this.transcribed;
    if (text) {
      this.#add(text, now - this.#lastText > FRAME);
      this.#lastText = now;
    }
    const point = Math.min(now - MARGIN, this.received);
    if (point > this.committed && this.#lastText <= point) {
      const blanks = this.#blanks;
      if (this.#quiet(point - PAUSE, point + PAUSE) && this.wordlessSound() <= WORDLESS_SECONDS) {
        this.#commit(point, this.partial.length);
      } else if (blanks && now >= blanks[1] + MARGIN && this.#lastText <= blanks[0] + RATE) {
        this.#commit(point, this.partial.length); // two sessions agree that there are no words
      }
    }
    if (this.partial.length && now - this.committed > MAX_PARTIAL) this.commitBetweenWords();
  }

  /** Commit where it is quietest after a partial word, where there is no pause. */
  commitBetweenWords() {
    const now = this.transcribed;
    const ends = this.partial.map((word) => Math.round(word.end * RATE));
    const half = Math.floor((this.committed + now) / 2);
    const late = ends.some((end) => end > half) ? ends.filter((end) => end > half) : ends;
    let best = null;
    for (const end of late) {
      if (end <= this.committed || end >= now - MARGIN) continue;
      const [level, point] = this.#quietest(Math.max(end - 4 * HOP, this.committed + HOP), end + 8 * HOP);
      if (!best || level <= best[0]) best = [level, point, ends.indexOf(end) + 1];
    }
    if (!best && now - MARGIN > this.committed + FRAME) {
      const [level, point] = this.#quietest(Math.max(now - 2 * RATE, this.committed + FRAME), now - MARGIN);
      best = [level, point, ends.filter((end) => end <= point).length];
    }
    if (best) this.#commit(best[1], best[2]);
  }

  /** Commit everything: the input has ended, and the server has transcribed all of it. */
  finish() { this.#commit(this.received, this.partial.length); }

  /** Return the words committed since the last call. */
  take() { return this.#final.splice(0); }

  // --- the model stuck in blanks (vllm#47614) ---

  /** Seconds of sound above the noise, transcribed without a word since the last word. */
  wordlessSound() {
    const noise = this.#noise([[0, this.received]]);
    return (this.#readings(this.#answered, this.transcribed).filter((db) => db > noise).length * HOP) / RATE;
  }

  /** Seconds of audio, silent or not, since the last word. */
  wordless() { return (this.transcribed - this.#answered) / RATE; }

  /** A new session must confirm that there are no words since the last word. */
  suspectBlanks() { this.#blanks = [this.#lastText, this.transcribed]; }

  /** End of the audio that need not be asked about again. */
  get #answered() { return Math.max(this.#lastText, this.committed, this.#blanks ? this.#blanks[1] : 0); }

  // --- private ---

  /** Make `point` the commit point and the first `count` partial words final. */
  #commit(point, count) {
    if (count) {
      const words = this.partial.splice(0, count);
      this.#final.push(...words);
      this.#spoken = [...words.at(-1).text].at(-1);
      this.#lastEnd = Math.round(words.at(-1).end * RATE);
    }
    this.committed = point;
    if (this.#blanks && point >= this.#blanks[1]) this.#blanks = null;
    const first = this.#blocks.findIndex(({ start, samples }) => start + samples.length > point);
    this.#blocks.splice(0, first < 0 ? this.#blocks.length : first);
    const excess = Math.floor((point - 30 * RATE - this.#levelsStart) / HOP);
    if (excess > 0) {
      this.#levels.splice(0, excess);
      this.#levelsStart += excess * HOP;
    }
  }

  /** Append text of the frame just transcribed to the partial words. */
  #add(text, blankBefore) {
    if (this.#lastText === this.#origin && this.#spoken && apart(this.#spoken, [...text][0])) {
      text = ` ${text}`; // the first word of a later session may come without its space
    }
    split(text).forEach((piece, i) => {
      const last = this.partial.at(-1);
      const fresh = !last || /^\s/u.test(piece) || /\s$/u.test(last.text);
      if (fresh || i || (blankBefore && /^[\p{L}\p{N}]/u.test(piece))) {
        const [start, end] = this.#locate(this.transcribed - FRAME);
        this.partial.push({ text: piece, start: start / RATE, end: end / RATE, session: this.session });
      } else {
        last.text += piece;
      }
    });
  }

  /** Start and end of the word whose text came with the frame that ends at `spoken`. */
  #locate(spoken) {
    const last = this.partial.at(-1);
    const earliest = Math.max(last ? Math.round(last.end * RATE) : this.#lastEnd, this.#origin);
    const first = Math.ceil(Math.max(earliest, spoken - MAX_WORD, this.#levelsStart) / HOP) * HOP;
    const noise = this.#noise([[spoken - NEAR, spoken]], true);
    const loud = this.#readings(first, spoken + 2 * FRAME).map((db) => db > noise);
    const expected = Math.floor((spoken - FRAME / 2 - first) / HOP); // index of the reading behind the word's end
    let stop = Math.max(expected, 1), nearest = (2 * FRAME) / HOP + 1;
    for (let i = 1; i < loud.length; i++) { // the end is where the sound falls silent, if that is near
      if (loud[i - 1] && !loud[i] && Math.abs(i - expected) < nearest) {
        nearest = Math.abs(i - expected);
        stop = i;
      }
    }
    let start = stop;
    while (start > 0 && loud.slice(Math.max(0, start - 7), start).includes(true)) start--; // < 140 ms: a plosive
    while (start < stop - 1 && !loud[start]) start++;
    const end = Math.max(first + stop * HOP, earliest + HOP);
    return [Math.max(earliest, Math.min(first + start * HOP, end - HOP)), end];
  }

  /** Level readings in dB that lie within [start, end). */
  #readings(start, end) {
    const first = Math.max(0, Math.ceil((start - this.#levelsStart) / HOP));
    return this.#levels.slice(first, Math.max(first, Math.floor((end - this.#levelsStart) / HOP)));
  }

  /** Is all audio within [start, end) silent? The future counts as silent. */
  #quiet(start, end) {
    const middle = Math.floor((start + end) / 2);
    const noise = this.#noise([[start - NEAR, middle], [middle, end + NEAR]]);
    return this.#readings(start, end).every((db) => db <= noise);
  }

  /** Level and position of the quietest reading within [start, end). */
  #quietest(start, end) {
    const readings = this.#readings(start, end);
    if (!readings.length) return [0, end];
    const level = Math.min(...readings);
    return [level, Math.ceil(start / HOP) * HOP + readings.indexOf(level) * HOP];
  }

  /** Level in dB below which sound is silence, from the last 30 s and from each of the spans `voices`. */
  #noise(voices, edge = false) {
    if (this.received - this.#noiseAt >= RATE / 2) {
      this.#noiseAt = this.received;
      const recent = this.#levels.slice((-30 * RATE) / HOP);
      const floor = percentile(recent, 0.1);
      const rise = Math.min(8, 0.4 * (percentile(recent, 0.95) - floor));
      this.#floor = Math.max(FLOOR_DB, floor + rise);
      this.#edge = Math.max(FLOOR_DB, floor + Math.min(rise, 2 + 6 * (floor - percentile(recent, 0.02))));
    }
    const spans = voices.map(([start, end]) => this.#readings(Math.max(start, this.received - 30 * RATE), end));
    const loud = spans.filter((span) => span.length).map((span) => percentile(span, 0.95));
    return Math.max(edge ? this.#edge : this.#floor, Math.min(...(loud.length ? loud : [FLOOR_DB])) - 35);
  }
}

/** Is a space missing between these two characters of different words? */
function apart(before, after) {
  return ![before, after].some((c) => /\s/u.test(c) || UNSPACED.test(c));
}

/** Split before each whitespace that follows a word, losing nothing. */
function split(text) {
  return text.match(/^\s*\S*|\s+\S*/gu).filter(Boolean);
}

function percentile(levels, share) {
  if (!levels.length) return FLOOR_DB;
  const sorted = levels.toSorted((a, b) => a - b);
  const at = share * (sorted.length - 1);
  const low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}
