// What was received, transcribed and committed: the part of client.dart without a network. The rules are those of
// voxtral_client/timeline.py, with three differences: words have no start; their ends come from the frame alone, with
// an error of up to 0.25 s; a model that is stuck without words (vllm#47614) is not detected. client_test.dart replays
// the traces of tests/traces.json that do not need these.
import 'dart:math';
import 'dart:typed_data';

const rate = 16000, frame = 1280, hop = 320; // samples: a second, one delta, one level reading
const margin = 4 * frame; // the text of a word comes within 0.32 s of its end
const pause = 3 * frame; // silence required on both sides of a commit point
const maxPartial = 30 * rate; // longest audio without a commit point; then one is set between two words
// Chinese and Japanese are written without spaces; Korean is not.
final unspaced = RegExp(
    r'[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\u{20000}-\u{3ffff}]',
    unicode: true);

/// A word with its leading space. [at]: the sample of the input near which it ends.
class Word {
  Word(this.text, this.at);
  String text;
  final int at;
  double get end => max(0, at) / rate; // seconds
}

/// Audio received, transcribed and committed. Positions are samples of the input, across all sessions.
class Timeline {
  int committed = 0, frames = 0, _origin = 0, _lastText = 0, _first = 0;
  String _spoken = ''; // the last character of the final text
  List<Word> partial = []; // words after the commit point: a new session replaces them
  Int16List _pcm = Int16List(0); // audio from _first on
  final List<double> _levels = [];

  int get received => _first + _pcm.length;
  int get transcribed => _origin + frames * frame;
  Int16List audio(int start, int count) => Int16List.sublistView(_pcm, start - _first, start - _first + count);

  void addAudio(Int16List samples) {
    final kept = audio(committed, received - committed);
    _pcm = Int16List(kept.length + samples.length)
      ..setAll(0, kept)
      ..setAll(kept.length, samples);
    _first = committed;
    for (var at = _levels.length * hop; at + hop <= received; at += hop) {
      final power = audio(at, hop).fold(0.0, (sum, x) => sum + x * x) / hop / 32768 / 32768;
      _levels.add(10 * log(power + 1e-10) / ln10);
    }
  }

  /// Start a session at the commit point; its words replace the partial ones. Return the position to send from.
  int begin() {
    frames = 0;
    partial = [];
    return _origin = _lastText = committed;
  }

  /// Add one delta; return the words that become final.
  List<Word> addDelta(String text) {
    frames += 1;
    if (_lastText == _origin && text.isNotEmpty && _spoken.isNotEmpty) {
      final ends = [_spoken, String.fromCharCode(text.runes.first)];
      final apart = ends.every((c) => c.trim().isNotEmpty && !unspaced.hasMatch(c));
      if (apart) text = ' $text'; // the first word of a later session may come without its space
    }
    final blankBefore = transcribed - _lastText > frame;
    if (text.isNotEmpty) _lastText = transcribed;
    for (final match in RegExp(r'\s*\S+|\s+').allMatches(text)) {
      final piece = match[0]!, word = RegExp(r'^[\p{L}\p{N}]', unicode: true).hasMatch(piece);
      if (partial.isEmpty || piece.trimLeft() != piece || (blankBefore && match.start == 0 && word)) {
        partial.add(Word(piece, transcribed - 3 * frame ~/ 2));
      } else {
        partial.last.text += piece;
      }
    }
    final point = min(transcribed - margin, received);
    if (point > committed && _lastText <= point && _quiet(point - pause, point + pause)) return commit(point);
    return partial.isNotEmpty && transcribed - committed > maxPartial ? commitBetweenWords() : [];
  }

  /// Commit where it is quietest near the end of a word, where there is no pause; return the words before.
  List<Word> commitBetweenWords() {
    final last = min(transcribed - margin, received), half = (committed + transcribed) ~/ 2;
    final ends = partial.map((word) => word.at).where((at) => at > committed && at < last);
    final late = ends.any((at) => at > half);
    final spans = [for (final at in ends) if (!late || at > half) (at - 2 * frame, at + 2 * frame, at)];
    if (spans.isEmpty) spans.add((max(transcribed - 2 * rate, committed + frame), last, last));
    var (point, word, best) = (last, last, double.infinity);
    for (final (start, stop, end) in spans) {
      for (var at = max(start, committed + hop) ~/ hop * hop; at < min(stop, received - hop); at += hop) {
        if (_levels[at ~/ hop] <= best) (point, word, best) = (at, end, _levels[at ~/ hop]);
      }
    }
    return commit(point, word);
  }

  /// Make [point] the commit point, within the audio; return the words that end before it, or up to [end].
  List<Word> commit(int point, [int? end]) {
    final words = partial.where((word) => word.at <= (end ?? point)).toList();
    partial = partial.sublist(words.length);
    if (words.isNotEmpty) _spoken = String.fromCharCode(words.last.text.runes.last);
    committed = point.clamp(committed, received);
    return words;
  }

  /// Is this silence, compared with the noise of the last 30 s and the speech on both sides?
  bool _quiet(int start, int end) {
    final recent = _levels.sublist(max(0, _levels.length - 1500))..sort();
    if (recent.isEmpty) return true;
    final floor = recent[recent.length ~/ 10], loud = recent[recent.length * 95 ~/ 100];
    final middle = (start + end) ~/ 2, beside = [_within(start - rate ~/ 2, middle), _within(middle, end + rate ~/ 2)];
    final voices = [for (final levels in beside) if (levels.isNotEmpty) (levels..sort())[levels.length * 95 ~/ 100]];
    final limit = [-65.0, voices.fold(0.0, min) - 35, floor + min(8, 0.4 * (loud - floor))].reduce(max);
    return _within(start, end).every((level) => level <= limit);
  }

  List<double> _within(int start, int end) {
    final to = min(max(0, end) ~/ hop, _levels.length), from = min(max(0, (start / hop).ceil()), to);
    return _levels.sublist(from, to);
  }
}
