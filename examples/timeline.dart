// What was received, transcribed and committed: the part of client.dart without a network, and without packages.
// The rules are those of voxtral_client/timeline.py, less what PROTOCOL.md does not ask for: starts of words, talk that
// never pauses, and the model stuck in blanks. client_test.dart holds it to the traces of tests/traces.json.
import 'dart:math';
import 'dart:typed_data';

const rate = 16000, frame = 1280, hop = 320; // samples: a second, one delta, one level reading
const commitMargin = 4 * frame; // a word's text comes within 0.32 s of its end
const pause = 3 * frame; // silence required on both sides of a commit point
// Chinese and Japanese are written without spaces.
final unspaced = RegExp(
    r'[\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\u{20000}-\u{3ffff}]',
    unicode: true);

/// A word with its leading space. [at]: the sample of the whole input near which it ends.
class Word {
  Word(this.text, this.at);
  String text;
  final int at;
  double get end => max(0, at) / rate; // seconds
}

/// What was received, transcribed and committed. Positions are samples of the whole input, across all sessions.
class Timeline {
  int committed = 0, origin = 0, frames = 0, lastText = 0, _first = 0;
  String spoken = ''; // the last character of the final text
  List<Word> partial = [];
  Int16List _pcm = Int16List(0);
  final List<double> _levels = [];

  int get received => _first + _pcm.length;
  int get transcribed => origin + frames * frame;
  Int16List audio(int from, int count) => Int16List.sublistView(_pcm, from - _first, from - _first + count);

  void addAudio(Int16List samples) {
    _pcm = Int16List(_pcm.length + samples.length)
      ..setAll(0, _pcm)
      ..setAll(_pcm.length, samples);
    for (var at = _levels.length * hop; at + hop <= received; at += hop) {
      final power = audio(at, hop).fold(0.0, (sum, x) => sum + pow(x / 32768, 2)) / hop;
      _levels.add(10 * log(power + 1e-10) / ln10);
    }
  }

  /// A new session starts at the commit point; its words replace the partial ones.
  void begin() {
    origin = lastText = committed;
    frames = 0;
    partial = [];
  }

  /// Book one delta; return the words that are final now.
  List<Word> addDelta(String text) {
    frames += 1;
    if (lastText == origin && text.isNotEmpty && spoken.isNotEmpty) {
      final ends = [spoken, String.fromCharCode(text.runes.first)];
      final apart = ends.every((c) => c.trim().isNotEmpty && !unspaced.hasMatch(c));
      if (apart) text = ' $text'; // a later session's first word may come without its space
    }
    if (text.isNotEmpty) lastText = transcribed;
    for (final match in RegExp(r'\s*\S+|\s+').allMatches(text)) {
      final part = match[0]!;
      if (part.trimLeft() != part || partial.isEmpty) {
        partial.add(Word(part, transcribed - 3 * frame ~/ 2));
      } else {
        partial.last.text += part;
      }
    }
    final point = min(transcribed - commitMargin, received);
    if (point <= committed || lastText > point || !_quiet(point - pause, point + pause)) return [];
    return commit(point);
  }

  List<Word> commit(int point) {
    final words = partial.where((word) => word.at <= point).toList();
    partial = partial.sublist(words.length);
    if (words.isNotEmpty) spoken = String.fromCharCode(words.last.text.runes.last);
    point = point.clamp(committed, received).toInt();
    _pcm = _pcm.sublist(point - _first);
    _first = committed = point;
    return words;
  }

  /// Is this silence? Measured against the noise of the last 30 s and the speech around.
  bool _quiet(int from, int to) {
    final recent = _levels.sublist(max(0, _levels.length - 1500))..sort();
    if (recent.isEmpty) return true;
    final floor = recent[recent.length ~/ 10], loud = recent[recent.length * 95 ~/ 100];
    final middle = (from + to) ~/ 2, beside = [_within(from - rate ~/ 2, middle), _within(middle, to + rate ~/ 2)];
    final voices = [for (final levels in beside) if (levels.isNotEmpty) (levels..sort())[levels.length * 95 ~/ 100]];
    final voice = voices.fold(0.0, min);
    final limit = [-65.0, voice - 35, floor + min(8, 0.4 * (loud - floor))].reduce(max);
    return _within(from, to).every((level) => level <= limit);
  }

  List<double> _within(int from, int to) {
    final end = min(max(0, to) ~/ hop, _levels.length), start = min(max(0, (from / hop).ceil()), end);
    return _levels.sublist(start, end);
  }
}
