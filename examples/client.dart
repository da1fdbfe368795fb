// A complete client of the realtime endpoint for Dart and Flutter (not for Flutter on the web: that is client.js's
// part). timeline.dart must lie beside it. See PROTOCOL.md.
//
//   dart pub add web_socket_channel                                     3.0 or newer
//   dart run client.dart talk.wav [ws://HOST:8000/v1/realtime]          the key comes from VLLM_API_KEY
//
// talk.wav: 16 kHz, mono, 16 bit, with a header of 44 bytes. In an app:
//
//   final transcription = Transcription(Uri.parse(url), key: key, onWord: ..., onPartial: ..., onStatus: ...);
//   transcription.add(samples);         // Int16List, 16 kHz mono, whenever there are some
//   transcription.end();                // then the last words come
//   await transcription.finished;       // throws Refused or SessionLost, after the words before it
import 'dart:async';
import 'dart:convert';
import 'dart:io';
import 'dart:math';
import 'dart:typed_data';

import 'package:web_socket_channel/io.dart';

import 'timeline.dart';

const ahead = 5 * rate; // audio sent but not yet transcribed, at most: little to send again
const piece = rate ~/ 4; // audio in one message, at most
const rollover = 75 * rate; // a session of stock vLLM gets slower with every frame: a new one at the next pause
const flatRollover = 300 * rate; // where it does not, as /v1/models then says
const answer = Duration(seconds: 10), stall = Duration(seconds: 20), giveUp = Duration(minutes: 2);

/// The server will not do this, however often it is asked.
class Refused implements Exception {
  Refused(this.message);
  final String message;
  @override
  String toString() => message;
}

/// The session is gone or was not granted: a new one may go on.
class SessionLost implements Exception {
  SessionLost(this.message, {this.busy = false});
  final String message;
  final bool busy;
  @override
  String toString() => message;
}

/// One transcription over as many sessions as it takes.
class Transcription {
  Transcription(Uri url, {this.key, this.model, required this.onWord, this.onPartial, this.onStatus})
      : url = url.replace(path: url.path.replaceFirst(RegExp(r'/+$'), '')) {
    finished = _run().whenComplete(() {
      _over = true;
      _changed();
    });
    finished.ignore(); // whoever awaits it gets the error; the program ends where nobody does yet
  }

  final Uri url; // ws://HOST:8000/v1/realtime
  final String? key;
  String? model;
  final void Function(Word word) onWord;
  final void Function(String text)? onPartial, onStatus;
  late final Future<void> finished;

  final _timeline = Timeline();
  bool _ended = false, _over = false;
  int _longest = 0;
  void Function() _pump = () {};
  Completer<void> _change = Completer();

  Map<String, String> get _headers => {if (key != null) 'Authorization': 'Bearer $key'};

  void add(Int16List samples) {
    _timeline.addAudio(samples);
    _changed();
  }

  void end() {
    _ended = true;
    _changed();
  }

  /// Wait here before [add] if the audio can wait (a file); a microphone cannot.
  Future<void> room() async {
    while (!_over && _timeline.received - _timeline.transcribed > 2 * ahead) {
      await _change.future;
    }
  }

  void _changed() {
    _pump();
    _change.complete();
    _change = Completer();
  }

  Future<void> _run() async {
    var failures = 0, furthest = 0, since = DateTime.now();
    while (true) {
      final before = _timeline.committed;
      while (_timeline.received <= before && !_ended) {
        await _change.future;
      }
      if (_timeline.received <= before) return;
      try {
        _timeline.begin();
        await _ask();
        await _session();
        failures = 0;
      } on SessionLost catch (lost) {
        final idle = !_ended && _timeline.frames > 0 && _timeline.received - _timeline.transcribed < 3 * rate;
        // What is transcribed once more is no progress.
        if (_timeline.transcribed > furthest || idle || lost.busy) failures = 0;
        furthest = max(furthest, _timeline.transcribed);
        if (failures == 0) since = DateTime.now();
        if (DateTime.now().difference(since) > giveUp) throw SessionLost('gave up: $lost');
        onStatus?.call(lost.busy ? 'all sessions are taken: waiting for a free one' : '$lost; trying again');
        if (!lost.busy) failures += 1;
        final wait = lost.busy ? 2000 : min(8000, 250 << min(failures, 5));
        await Future<void>.delayed(Duration(milliseconds: (wait * (0.5 + Random().nextDouble())).round()));
      }
    }
  }

  /// /v1/models tells a wrong key, the model's name and the longest session.
  Future<void> _ask() async {
    if (model != null && _longest > 0) return;
    final path = url.path.replaceFirst(RegExp(r'/realtime$'), '/models');
    final http = HttpClient()..connectionTimeout = answer;
    try {
      final request = await http.getUrl(url.replace(scheme: url.isScheme('wss') ? 'https' : 'http', path: path));
      _headers.forEach(request.headers.set);
      final reply = await request.close().timeout(answer);
      if (reply.statusCode == 401) throw Refused('wrong API key (HTTP 401)');
      if (reply.statusCode == 403) throw Refused('wrong path (HTTP 403)');
      if (reply.statusCode >= 500) throw SessionLost('the server is not well (HTTP ${reply.statusCode})');
      if (reply.statusCode != 200) throw Refused('$url: no realtime server there (HTTP ${reply.statusCode})');
      final models = (jsonDecode(await utf8.decodeStream(reply).timeout(answer)) as Map)['data'] as List;
      final served = models.firstWhere((entry) => entry['id'] == model, orElse: () => models.first) as Map;
      model ??= served['id'] as String;
      final age = served['voxtral_speed'] == true ? flatRollover : rollover;
      _longest = min(age, ((served['max_model_len'] as int?) ?? 4096) * frame ~/ 2);
    } on TimeoutException {
      throw SessionLost('$url: no server answers there');
    } on IOException {
      throw SessionLost('$url: no server answers there');
    } finally {
      http.close(force: true);
    }
  }

  /// One session: returns where the next one should go on (or all is done), throws SessionLost or Refused.
  Future<void> _session() async {
    final timeline = _timeline, over = Completer<void>();
    final channel = IOWebSocketChannel.connect(url,
        headers: _headers, pingInterval: const Duration(seconds: 20), connectTimeout: answer);
    try {
      await channel.ready;
    } on Exception catch (error) {
      throw SessionLost('no connection ($error)');
    }
    var sent = timeline.committed, finishing = false, started = false, answered = DateTime.now();
    void send(String type, [Map<String, Object?> fields = const {}]) =>
        channel.sink.add(jsonEncode({'type': type, ...fields}));
    void finish() {
      if (!over.isCompleted) over.complete();
    }

    void fail(Exception error) {
      if (!over.isCompleted) over.completeError(error);
    }

    void tell(List<Word> words) => words.forEach(onWord);
    void cut() {
      // where it stands, for want of a pause
      tell(timeline.commit(timeline.transcribed - commitMargin));
      finish();
    }

    _pump = () {
      while (started && !finishing) {
        final count = [piece, timeline.transcribed + ahead - sent, timeline.received - sent].reduce(min);
        if (count <= 0) break;
        final bytes = Uint8List.sublistView(timeline.audio(sent, count));
        sent += count;
        send('input_audio_buffer.append', {'audio': base64Encode(bytes)});
      }
      if (started && _ended && !finishing && sent >= timeline.received) {
        finishing = true;
        send('input_audio_buffer.commit', {'final': true});
      }
    };
    void receive(dynamic message) {
      if (over.isCompleted) return;
      final event = jsonDecode(message as String) as Map<String, dynamic>;
      answered = DateTime.now();
      switch (event['type']) {
        case 'session.created':
          send('session.update', {'model': model});
          send('input_audio_buffer.commit');
          started = true;
        case 'transcription.delta':
          final before = timeline.committed, age = timeline.frames * frame;
          tell(timeline.addDelta(event['delta'] as String));
          onPartial?.call(timeline.partial.map((word) => word.text).join());
          if (finishing) break;
          if (age > _longest && timeline.committed > before) return finish(); // rollover at a pause
          if (age > 1.8 * _longest) return cut(); // no pause: between two words
        case 'transcription.done':
          final done = finishing && timeline.transcribed >= timeline.received + rate ~/ 4;
          if (!done && timeline.frames < 6) return fail(SessionLost('the server ended the session at once'));
          if (!done) return cut(); // the limit came first
          tell(timeline.commit(timeline.transcribed));
          return finish();
        case 'error':
          final text = event['error'] as String;
          if (event['code'] != 'processing_error') return fail(Refused('${event['code']}: $text'));
          return fail(SessionLost(text, busy: text.contains('currently busy')));
      }
      _changed();
    }

    void take(dynamic message) {
      try {
        receive(message);
      } on Exception catch (error) {
        fail(error);
      }
    }

    channel.stream.listen(take,
        onError: (Object error) => fail(SessionLost('connection lost ($error)')),
        onDone: () => fail(SessionLost('connection lost (${channel.closeCode} ${channel.closeReason ?? ''})')));
    final watch = Timer.periodic(const Duration(seconds: 1), (_) {
      final starved = started && sent - timeline.transcribed < 3 * rate && !finishing; // nothing to work on
      if (starved) answered = DateTime.now();
      final silence = DateTime.now().difference(answered);
      if (silence > (started ? stall : answer)) fail(SessionLost('no answer for ${silence.inSeconds} s'));
    });
    try {
      await over.future;
    } finally {
      watch.cancel();
      _pump = () {};
      unawaited(channel.sink.close());
    }
  }
}

Future<void> main(List<String> arguments) async {
  if (arguments.isEmpty) {
    stderr.writeln('usage: dart run client.dart talk.wav [ws://HOST:8000/v1/realtime]');
    exit(2);
  }
  final url = Uri.parse(arguments.length > 1 ? arguments[1] : 'ws://localhost:8000/v1/realtime');
  final transcription = Transcription(url,
      key: Platform.environment['VLLM_API_KEY'],
      onWord: (word) => stdout.writeln('${word.end.toStringAsFixed(2).padLeft(8)} ${word.text}'),
      onStatus: stderr.writeln);
  final samples = Int16List.sublistView((await File(arguments[0]).readAsBytes()).sublist(44));
  Future<void> send() async {
    for (var from = 0; from < samples.length; from += rate ~/ 10) {
      await transcription.room();
      transcription.add(samples.sublist(from, min(from + rate ~/ 10, samples.length)));
    }
    transcription.end();
    await transcription.finished;
  }

  try {
    await Future.any([send(), transcription.finished]);
  } on Exception catch (error) {
    stderr.writeln('error: $error');
    exitCode = 1;
  }
  exit(exitCode);
}
